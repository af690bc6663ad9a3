"""What layers are made of, in C (`labkit/native/kernels.c`) where that is faster, on CPUs, and in PyTorch elsewhere.

A decode step is bound by memory: it reads each weight once. Its layers are one call into C, or half a layer is, which takes
hardly longer than reading the weights; PyTorch's products of one row with a bfloat16 matrix take twice that, and each operation
between them costs more than it computes. For many rows C's products are the faster ones on a processor with AVX2 alone, for
which PyTorch has none of bfloat16, and on one with AMX in bfloat16, and so is its attention of prompts; elsewhere PyTorch's are,
and C does what stands between them. LABKIT_KERNELS=torch in the environment leaves C out.
"""

import ctypes
import math
import os
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from labkit import native
from labkit.comm import Comm
from labkit.shm import Sums

# Up to which a product in C is the faster one without tiles: with AVX2 any, and attention of prompts too.
ROWS = math.inf if torch.backends.cpu.get_cpu_capability() == "AVX2" else 8
TILED_ROWS = 512  # and with them; an MLP always is
TOKENS = 16  # a block of the cache holds a multiple of these
TILE = 32  # widths are multiples of these where tiles compute
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
Addresses = ctypes.Array[ctypes.c_void_p]
_BUILDS = {"AVX512": "_kernels_avx512", "AVX2": "_kernels_avx2"}


class _Struct(ctypes.Structure):
    """A struct of kernels.c: whole numbers, then a float `eps` if there is one, then addresses of tensors or structs (None:
    NULL)."""

    def __init__(self, **values: Any) -> None:
        self.kept = values  # the tensors too: their memory is in use
        super().__init__(**{k: _address(v) for k, v in values.items()})


def _address(value: Any) -> Any:
    if isinstance(value, ctypes.Structure):
        return ctypes.addressof(value)
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def _fields(numbers: str, tensors: str, eps: bool = True) -> list[tuple[str, Any]]:
    middle: list[tuple[str, Any]] = [("eps", ctypes.c_double)] if eps else []
    return [
        *((name, ctypes.c_int64) for name in numbers.split()),
        *middle,
        *((name, ctypes.c_void_p) for name in tensors.split()),
    ]


class AttentionStruct(_Struct):
    _fields_ = _fields("dtype hidden heads kv_heads width group skipped", "norm qkv qkv_bias q_norm k_norm o")


class MlpStruct(_Struct):
    _fields_ = _fields("dtype hidden inner", "norm gate_up gate_up_bias down")


class LayerStruct(_Struct):
    _fields_ = _fields("", "attention mlp", eps=False)


class StepStruct(_Struct):
    _fields_ = _fields("rows threads size blocks", "slots positions tables cos sin", eps=False)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled `kernels.c` that suits this processor, or None."""
    build = _BUILDS.get(torch.backends.cpu.get_cpu_capability())
    found = native.load(build) if build and os.environ.get("LABKIT_KERNELS") != "torch" else None
    if found is None:
        return None
    p, n, i, f = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
    attention, mlp, step = (ctypes.POINTER(struct) for struct in (AttentionStruct, MlpStruct, StepStruct))
    return native.declare(
        found,
        {
            "attention": (None, (attention, step, p, p, p, p)), "mlp": (None, (mlp, n, i, p, p)),
            "linear": (None, (p, p, p, p, i, n, n, n, i, i)), "rms_norm": (None, (p, p, p, n, n, f, i, i)),
            "swiglu": (None, (p, p, n, n, i, i)), "prepare": (None, (attention, step, p, p, p)),
            "singles": (None, (attention, step, p, p, p, p)), "has_tiles": (i, ()),
            "piece": (None, (attention, step, n, n, n, p, p, p, p, p)),
            "layers": (i, (p, n, step, p, p, p, p, ctypes.POINTER(Sums))),
        },
    )  # fmt: skip


@cache
def has_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 (AMX)."""
    c = library()
    return c is not None and bool(c.labkit_has_tiles())


def by_tiles(dtype: torch.dtype, *widths: int) -> bool:
    """Whether C computes products of these widths by tiles."""
    return dtype == torch.bfloat16 and has_tiles() and all(n % TILE == 0 for n in widths)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products on this CPU take several times as long in this format as in float32: with AVX2 alone, in 16
    bits."""
    return dtype != torch.float32 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def widens(x: torch.Tensor) -> bool:
    """Whether PyTorch had better multiply x (N, ...) in float32. Not if there are no rows, as of an expert without tokens; nor a
    fake tensor, whose operations are counted as they are."""
    return type(x) is torch.Tensor and x.is_cpu and len(x) > 0 and is_slow(x.dtype)


def suiting(x: torch.Tensor, rows: float = math.inf) -> Any:
    """The library, if C can and should work on x (N, ...): real memory of the host, not a fake tensor's, in a number format
    that it knows, N between 1 and `rows`. Else None."""
    if type(x) is not torch.Tensor or not x.is_cpu or x.dtype not in DTYPES or not x.is_contiguous():
        return None
    return library() if 0 < x.shape[0] <= rows else None


def mlp(c: Any, struct: MlpStruct, x: torch.Tensor) -> torch.Tensor:
    """What an MLP, as far as it is on this rank, adds to the residual x (N, hidden); norm included."""
    y = torch.empty_like(x)
    c.labkit_mlp(struct, x.shape[0], torch.get_num_threads(), x.data_ptr(), y.data_ptr())
    return y


def attention(
    c: Any, struct: AttentionStruct, step: StepStruct, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """What attention, as far as it is on this rank, adds to the residual x (N, hidden); norm included.

    One token of each sequence. k, v: the layer's cache (blocks, size, kv_heads, width). Those of this step are put there.
    """
    y = torch.empty_like(x)
    c.labkit_attention(struct, step, x.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr())
    return y


def layers(
    c: Any, structs: ctypes.Array[LayerStruct], step: StepStruct, x: torch.Tensor, cache: tuple[Addresses, Addresses], comm: Comm
) -> None:  # fmt: skip
    """The residual x (N, hidden) becomes what it is behind all layers of a stage, for one token of each sequence.

    cache: where each layer's K is, and each layer's V. `comm` can reduce in C.
    """
    y = torch.empty_like(x)

    def call(sums: Sums | None) -> int:
        code: int = c.labkit_layers(structs, len(structs), step, x.data_ptr(), *cache, y.data_ptr(), sums)
        return code

    comm.all_reduces_in_c(x, "tp", ("attention", "mlp"), len(structs), call)


def singles(
    c: Any, struct: AttentionStruct, step: StepStruct, qkv: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """(B, heads x width): attention for the first B tokens in qkv (N, all heads x width), one of each sequence, as it comes from
    its product."""
    y = qkv.new_empty(step.rows, struct.heads * struct.width)
    c.labkit_singles(struct, step, qkv.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr())
    return y


def piece(
    c: Any, struct: AttentionStruct, step: StepStruct, rows: slice, start: int, table: torch.Tensor | None,
    qkv: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """(n, heads x width): attention for the n `rows` of qkv (N, all heads x width), the tokens from position `start` on of the
    sequence in blocks `table`, whose K and V have been put into the cache."""
    assert table is not None, "on a CPU all pieces have one"
    n = rows.stop - rows.start
    y = qkv.new_empty(n, struct.heads * struct.width)
    c.labkit_piece(
        struct, step, rows.start, n, start, table.data_ptr(), qkv.data_ptr(), k.data_ptr(), v.data_ptr(),
        y.data_ptr(),
    )  # fmt: skip
    return y


def prepare(
    c: Any, struct: AttentionStruct, step: StepStruct, qkv: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Normalises (where the model does) and rotates q and k of qkv (N, all heads x width) in place; k and v go into the cache."""
    c.labkit_prepare(struct, step, qkv.data_ptr(), k.data_ptr(), v.data_ptr())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, wide: bool = False) -> torch.Tensor:
    """x (N, in) times weight (out, in) transposed, plus bias (out,).

    In float32 if `wide`; where PyTorch computes it in x's format, it has been rounded to that before.
    """
    out = weight.shape[0]
    c = suiting(x, TILED_ROWS if by_tiles(x.dtype, *weight.shape) else ROWS)
    if c is None:
        if widens(x):
            y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        else:
            y = F.linear(x, weight, bias)
        return y.to(torch.float32 if wide else x.dtype)
    y = x.new_empty(x.shape[0], out, dtype=torch.float32 if wide else x.dtype)
    c.labkit_linear(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), wide,
        x.shape[0], x.shape[1], out, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., width) over the root of the mean of its squares, times weight (width,) (arXiv 1910.07467)."""
    c = suiting(x)
    if c is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    y, width = torch.empty_like(x), x.shape[-1]
    c.labkit_rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps, DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (N, width), of both side by side (N, 2 width) (arXiv 2002.05202)."""
    c = suiting(gate_up)
    if c is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    c.labkit_swiglu(gate_up.data_ptr(), y.data_ptr(), *y.shape, DTYPES[y.dtype], torch.get_num_threads())
    return y


def top(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest numbers of each row of x (B, n), and where they stand, (B, k) each, largest first; if k is 1, the first of
    equal ones. On a CPU NumPy finds them in a tenth to a third of the time that PyTorch takes."""
    if type(x) is not torch.Tensor or not x.is_cpu:
        return x.max(dim=1, keepdim=True) if k == 1 else x.topk(k)
    numbers = x.numpy()
    found = numbers.argmax(axis=1, keepdims=True) if k == 1 else np.argpartition(numbers, -k, axis=1)[:, -k:]
    at = torch.from_numpy(found)
    values, order = x.gather(1, at).sort(dim=1, descending=True)
    return values, at.gather(1, order)
