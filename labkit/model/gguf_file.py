"""The GGUF container: its header, and its tensors dequantised. What the keys and tensors mean is `gguf_import`'s business.

The header is read here and not by gguf.GGUFReader, which takes 5 s for the default model's vocabulary, and which a single
flipped bit in an array's length sends into an endless loop that eats the memory (gguf 0.19). Types, block sizes and
dequantisation are the gguf package's.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from labkit.model.errors import ModelError


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in the file. `shape` is in PyTorch's order (GGUF writes it the other way round)."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class Source:
    """A GGUF file's header: its key/value pairs and its table of tensors."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, Tensor]

    def refuse(self, why: str) -> NoReturn:
        raise ModelError(f"{self.path}: {why}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; a wrong type, or no value and no default, is refused."""
        value = self.keys.get(key, default)
        if value is None:
            self.refuse(f"the key {key!r} is missing")
        if type(value) is not kind:
            self.refuse(f"the key {key!r} should be of type {kind.__name__}, found {type(value).__name__}")
        return value

    def positive(self, key: str, kind: type, default: Any = None) -> Any:
        """The number at `key`, which must be above zero and finite."""
        value = self.get(key, kind, default)
        if not 0 < value < math.inf:
            self.refuse(f"the key {key!r} should be a number above zero, found {value}")
        return value


_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class _Cursor:
    """Little-endian values read one after another from bytes that it never runs past."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ModelError(
                f"{self.path} is truncated or damaged: the header asks for {size:,} bytes at byte {self.at:,}, "
                f"the file has {len(self.data):,}"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self) -> str:
        try:
            return self.take(self.u64()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path} is damaged: the text before byte {self.at:,} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.array(kind, 1)[0]
        return self.array(self.u32(), self.u64())

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelError(f"{self.path} is damaged: value type {kind} before byte {self.at:,} is not known")
        dtype = np.dtype(_SCALARS[GGUFValueType(kind)])
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values


def read_header(path: Path) -> Source:
    """The header of the file, checked against the file's size; tensors stay on disk."""
    with path.open("rb") as file:
        magic, size = file.read(4), file.seek(0, os.SEEK_END)
        if magic != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, path)
            cursor.take(4)
            if (version := cursor.u32()) not in (2, 3):
                raise ModelError(f"{path} has GGUF version {version}; 2 and 3 (little-endian) can be read")
            tensor_count, key_count = cursor.u64(), cursor.u64()
            keys: dict[str, Any] = {}
            for _ in range(key_count):
                key = cursor.string()
                keys[key] = cursor.value(cursor.u32())
            table = [(cursor.string(), *_tensor_info(cursor)) for _ in range(tensor_count)]

    align = keys.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ModelError(f"{path} is damaged: general.alignment is {align!r}")
    first = -(-cursor.at // align) * align
    tensors = {name: Tensor(shape, kind, first + offset, length) for name, shape, kind, offset, length in table}
    if len(tensors) != len(table):
        raise ModelError(f"{path} is damaged: two of its tensors have the same name")
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if end > size:
        raise ModelError(f"{path} is truncated: its header describes {end:,} bytes, the file has {size:,}")
    return Source(path, keys, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[tuple[int, ...], GGMLQuantizationType, int, int]:
    """The shape, type, offset and size in bytes of the tensor whose name was just read."""
    if not 1 <= (count := cursor.u32()) <= 4:
        raise ModelError(f"{cursor.path} is damaged: a tensor of {count} dimensions before byte {cursor.at:,}")
    dims = [cursor.u64() for _ in range(count)]
    kind, offset = cursor.u32(), cursor.u64()
    if kind not in GGMLQuantizationType.__members__.values():
        raise ModelError(f"{cursor.path} is damaged: a tensor of type {kind} before byte {cursor.at:,}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if dims[0] % block:
        raise ModelError(
            f"{cursor.path} is damaged: rows of {dims[0]} elements before byte {cursor.at:,}, not {block}s"
        )
    return tuple(reversed(dims)), GGMLQuantizationType(kind), offset, math.prod(dims) // block * block_bytes


def dequantised(source: Source, name: str, data: np.ndarray) -> np.ndarray:
    """One tensor as float32."""
    tensor = source.tensors[name]
    raw = data[tensor.start : tensor.start + tensor.size].reshape(*tensor.shape[:-1], -1)
    try:
        weight = dequantize(raw, tensor.kind)
    except NotImplementedError as error:
        source.refuse(f"tensor {name!r} is of type {tensor.kind.name}, which gguf cannot dequantise: {error}")
    if not np.isfinite(weight).all():
        source.refuse(f"the file is damaged: tensor {name!r} holds values that are not finite")
    return weight
