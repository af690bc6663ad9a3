"""Weights by slices: a rank reads the pieces that its own shard is made of, and no others.

A parameter of the decoder is one or several `Piece`s of checkpoint tensors laid one under another. `Checkpoint` cuts
them out of safetensors files, `RandomWeights` makes them from a seed; both give the same piece whatever else is split.
Nothing here knows about ranks.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from labkit.model.errors import ModelError

DTYPES = ("F32", "F16", "BF16")  # as safetensors writes them
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Piece:
    """Indices `part` along `dim` of the checkpoint tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    dim: int
    part: range

    @property
    def sliced_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.dim], len(self.part), *self.shape[self.dim + 1 :])


class Weights(Protocol):
    """Where pieces come from. `bytes_read` is how many bytes of weights have been read so far."""

    bytes_read: int

    def read(self, piece: Piece) -> torch.Tensor: ...


def parameter(pieces: list[Piece], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An empty parameter with the pieces, stacked along their first dimension, that are to fill it."""
    shapes = [piece.sliced_shape for piece in pieces]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    made = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
    made.pieces = pieces  # type: ignore[attr-defined]
    return made


def norm_weight(name: str, width: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """The weight (width,) of a norm, whole on every rank."""
    return parameter([Piece(name, (width,), 0, range(width))], dtype, device)


def fill(parameters: Iterable[nn.Parameter], weights: Weights) -> None:
    """Reads every parameter's pieces into it, converted to its dtype and moved to its device."""
    for p in parameters:
        row = 0
        for piece in p.pieces:  # type: ignore[attr-defined]
            part = weights.read(piece)
            p.data[row : row + part.shape[0]].copy_(part)
            row += part.shape[0]


class Checkpoint:
    """A Hugging Face folder with model.safetensors, or model.safetensors.index.json and the files it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files = _tensor_files(folder)
        self._open: dict[Path, safe_open] = {}
        self._stack = ExitStack()

    def check(self, pieces: Iterable[Piece]) -> None:
        """Raises ModelError where one of the pieces isn't there, or isn't what it should be. Only headers are read."""
        for piece in pieces:
            self._find(piece)

    def read(self, piece: Piece) -> torch.Tensor:
        index = (slice(None),) * piece.dim + (slice(piece.part.start, piece.part.stop),)
        part: torch.Tensor = self._find(piece)[index]
        self.bytes_read += part.numel() * part.element_size()
        return part

    def _find(self, piece: Piece) -> Any:
        """The piece's tensor, still in the file."""
        file = self._files.get(piece.name)
        if file is None:
            raise ModelError(f"{self.folder} has no tensor {piece.name}, which its config.json calls for")
        if file not in self._open:
            self._open[file] = self._stack.enter_context(_opened(file))
        try:
            whole = self._open[file].get_slice(piece.name)
        except SafetensorError as error:  # the index says it is in this file, and it isn't
            raise ModelError(f"{file} has no tensor {piece.name}: {error}") from error
        if tuple(whole.get_shape()) != piece.shape:
            raise ModelError(
                f"{file}: {piece.name} has shape {tuple(whole.get_shape())}; config.json calls for {piece.shape}"
            )
        if whole.get_dtype() not in DTYPES:
            raise ModelError(f"{file}: {piece.name} is {whole.get_dtype()}; supported are {', '.join(DTYPES)}")
        return whole

    def close(self) -> None:
        self._stack.close()
        self._open.clear()


def _opened(file: Path) -> safe_open:
    """Its header has been read, and fits the file."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or is not a safetensors file: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file. An index may only name files inside the folder."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = set(named.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index} is not an index of safetensors files: {error!r}") from error
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{index} names {file!r}, which is not a plain file name in that folder")
            if not (folder / file).is_file():
                raise ModelError(f"{index} names {file}, which is missing")
        return {name: folder / file for name, file in named.items()}
    if single.exists():
        with _opened(single) as opened:
            return dict.fromkeys(opened.keys(), single)
    pickled = next((file.name for kind in PICKLES for file in sorted(folder.glob(kind))), None)
    raise ModelError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json"
        + (f"; {pickled} is pickled, which can run any code when it is loaded, and is not read" if pickled else "")
    )


class RandomWeights:
    """Seeded random weights: normal with the given spread; ones for norms. Nothing is read, so `bytes_read` stays 0.

    A tensor is made in blocks of 64 indices along the dimension in which it is split, each block from a seed of its own
    (tensor name, block number), so that a shard is the same numbers as that part of the whole.
    """

    BLOCK = 64

    def __init__(self, seed: int = 0, std: float = 0.02) -> None:
        self.seed, self.std = seed, std
        self.bytes_read = 0

    def read(self, piece: Piece) -> torch.Tensor:
        if piece.name.endswith("norm.weight"):
            return torch.ones(piece.sliced_shape)
        if not len(piece.part):
            return torch.empty(piece.sliced_shape)
        first, last = piece.part.start // self.BLOCK, (piece.part.stop - 1) // self.BLOCK
        made = torch.cat([self._block(piece, i) for i in range(first, last + 1)])
        part = made[piece.part.start - first * self.BLOCK :][: len(piece.part)]
        return part.movedim(0, piece.dim)

    def _block(self, piece: Piece, number: int) -> torch.Tensor:
        key = hashlib.sha256(f"{self.seed}/{piece.name}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        others = (*piece.shape[: piece.dim], *piece.shape[piece.dim + 1 :])
        return torch.empty(self.BLOCK, *others).normal_(std=self.std, generator=generator)
