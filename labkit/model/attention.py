"""Causal self-attention over a KV cache in blocks, for the heads that one tensor-parallel rank holds.

The cache belongs to one pipeline stage: it holds K and V of that stage's layers only. A sequence's tokens lie in blocks of the
cache that its table names, in order (PagedAttention, arXiv 2309.06180); who gets which block is the scheduler's business. A
`Batch` says which tokens of which sequences one forward pass computes.
"""

import ctypes
import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from labkit import split
from labkit.comm import Comm, Forward
from labkit.model import kernels
from labkit.model.checkpoint import Piece, norm_weight
from labkit.model.config import ModelConfig
from labkit.parallel.tensor import ColumnParallelLinear, RowParallelLinear


@dataclass
class Batch:
    """Tokens of one step, sequence after sequence: N tokens of B sequences. Positions count from 0. N and B may be 0, when only
    other replicas have something to do.

    First come the sequences with one token, of which attention is computed at once; then those with pieces of their prompts.
    """

    positions: torch.Tensor  # (N,)
    slots: torch.Tensor  # (N,) where in the cache each token's K and V go: block x block size + offset
    last: torch.Tensor  # (B,) where in N the last token stands of each sequence that wants logits
    singles: int  # sequences with one token
    tables: torch.Tensor | None  # (singles, n) their blocks, filled up with any; None without singles
    context: int  # tokens of the longest of them, this step's included
    # Of the others: their tokens' rows behind those of the singles, position of the first, table of blocks (on a GPU only if
    # that isn't 0).
    pieces: list[tuple[slice, int, torch.Tensor | None]]
    # Tokens of each replica in this step, this one's N among them, where they take steps together; else [N].
    replicas: list[int]
    size: int  # tokens in a block of the cache
    rope: tuple[torch.Tensor, torch.Tensor] = field(init=False)  # cos and sin of the positions, from the decoder

    @cached_property
    def singles_in_c(self) -> kernels.StepStruct:
        return self._struct(slice(self.singles), self.tables)

    @cached_property
    def pieces_in_c(self) -> kernels.StepStruct:
        return self._struct(slice(self.singles, None), None)

    def _struct(self, rows: slice, tables: torch.Tensor | None) -> kernels.StepStruct:
        cos, sin = (t[rows] for t in self.rope)
        return kernels.StepStruct(
            rows=len(cos), threads=torch.get_num_threads(), size=self.size, blocks=0 if tables is None else tables.shape[1],
            slots=self.slots[rows], positions=self.positions[rows], tables=tables, cos=cos, sin=sin,
        )  # fmt: skip

    @cached_property
    def mask(self) -> torch.Tensor:
        """(singles, 1, 1, context), added to scores: 0 where single tokens have something to attend to, else -inf."""
        nothing = torch.arange(self.context, device=self.positions.device) > self.positions[: self.singles].unsqueeze(1)
        return self.rope[0].new_zeros(nothing.shape).masked_fill_(nothing, -torch.inf)[:, None, None, :]

    @classmethod
    def make(
        cls, lengths: list[int], starts: list[int], tables: list[list[int]], ends: list[bool], size: int,
        device: torch.device, replicas: list[int] | None = None,
    ) -> "Batch":  # fmt: skip
        """`lengths[i]` tokens go to positions `starts[i]`... of the sequence in blocks `tables[i]` of `size` tokens; it wants
        logits if `ends[i]`. Sequences with one token come first."""
        singles = next((i for i, n in enumerate(lengths) if n > 1), len(lengths))

        def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        context = [start + 1 for start in starts[:singles]]
        used = [table[: -(-n // size)] for table, n in zip(tables, context, strict=False)]
        widest = max(map(len, used), default=0)
        at = [(i, p) for i, (start, n) in enumerate(zip(starts, lengths, strict=True)) for p in range(start, start + n)]
        pieces = zip(lengths[singles:], accumulate(lengths[singles:]), starts[singles:], tables[singles:], strict=True)
        return cls(
            positions=tensor([p for _, p in at]),
            slots=tensor([slot(tables[i], p, size) for i, p in at]),
            last=tensor([stop - 1 for i, stop in enumerate(accumulate(lengths)) if ends[i]]),
            singles=singles,
            tables=tensor([filled(table, widest) for table in used]) if used else None,
            context=max(context, default=0),
            pieces=[
                (
                    slice(stop - n, stop),
                    start,
                    tensor(table[: -(-(start + n) // size)]) if start or device.type == "cpu" else None,
                )
                for n, stop, start, table in pieces
            ],
            replicas=replicas or [sum(lengths)],
            size=size,
        )


def slot(table: list[int], position: int, size: int) -> int:
    """Where in the cache K and V of the token at `position` go, of a sequence in blocks `table` of `size` tokens."""
    return table[position // size] * size + position % size


def filled(table: list[int], blocks: int) -> list[int]:
    """The first `blocks` of a table; where it has fewer, any others behind them, which nobody looks into."""
    return (table + table[:1] * (blocks - len(table)))[:blocks]


class KVCache:
    """K and V of one stage: per layer two tensors (blocks, tokens of a block, kv_heads, head_dim)."""

    def __init__(
        self,
        layers: int,
        blocks: int,
        size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks, self.size = blocks, size
        shape = (blocks, size, kv_heads, head_dim)
        self.k = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.v = [_zeros(shape, dtype, device) for _ in range(layers)]

    @cached_property
    def in_c(self) -> tuple[kernels.Addresses, kernels.Addresses]:
        """Where each layer's K is, and each layer's V."""
        array = ctypes.c_void_p * len(self.k)
        return array(*(t.data_ptr() for t in self.k)), array(*(t.data_ptr() for t in self.v))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU of memory that the system hands out only when it is written, so an idle cache costs nothing.

    Zeros and not garbage, because a masked-out NaN times a weight of 0 would still be NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


class Rotary:
    """Rotary position embedding (arXiv 2104.09864), with linear or Llama 3's scaling (arXiv 2407.21783)."""

    def __init__(self, cfg: ModelConfig, device: torch.device) -> None:
        rope = cfg.rope
        exponents = torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim
        freq = 1.0 / (rope["rope_theta"] ** exponents)  # (head_dim / 2,)
        if rope["rope_type"] == "linear":
            freq = freq / rope["factor"]
        elif rope["rope_type"] == "llama3":
            # Long wavelengths are stretched by `factor`, short ones kept, those between blended.
            turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            freq = (1 - keep) * freq / rope["factor"] + keep * freq
        self.freq = freq

    def tables(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin for `rotate`, (N, 1, head_dim) each: made once per step, used by every layer."""
        angles = (positions.float().unsqueeze(1) * self.freq).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates (N, heads, head_dim) by position; dimension i is paired with i + head_dim / 2."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """What attention adds to the residual (N, hidden), behind a norm.

    q, k, v column-parallel in one product; scaled-dot-product attention on the local heads; o row-parallel.
    """

    def __init__(
        self, cfg: ModelConfig, prefix: str, norm: nn.Parameter, comm: Comm, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.cfg, self.norm = cfg, norm
        self.share = split.heads(cfg.heads, cfg.kv_heads, comm.mesh.size("tp"))[comm.mesh.tp_rank]
        d, group = cfg.head_dim, cfg.heads // cfg.kv_heads
        self.grid = (len(self.share.kv), group)
        q, kv = _scaled(self.share.query, d), _scaled(self.share.kv, d)
        outs = (("q_proj", cfg.heads * d, q), ("k_proj", cfg.kv_heads * d, kv), ("v_proj", cfg.kv_heads * d, kv))
        weights = [Piece(f"{prefix}.{name}.weight", (full, cfg.hidden), 0, part) for name, full, part in outs]
        biases = [Piece(f"{prefix}.{name}.bias", (full,), 0, part) for name, full, part in outs]
        self.qkv = ColumnParallelLinear(weights, biases if cfg.qkv_bias else [], dtype, device)
        o_bias = Piece(f"{prefix}.o_proj.bias", (cfg.hidden,), 0, range(cfg.hidden)) if cfg.out_bias else None
        o_weight = Piece(f"{prefix}.o_proj.weight", (cfg.hidden, cfg.heads * d), 1, q)
        self.o = RowParallelLinear(o_weight, o_bias, "attention", dtype, device)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (
                norm_weight(f"{prefix}.{name}_norm.weight", d, dtype, device) for name in ("q", "k")
            )

    def forward(self, x: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor) -> Forward:
        """Writes this step's K and V into the layer's cache `k`, `v`, then attends over it."""
        if c := self.in_one_call(x, batch):
            return self.o.reduce(kernels.attention(c, self.in_c, batch.singles_in_c, x, k, v))
        c = kernels.suiting(x) if batch.size % kernels.TOKENS == 0 else None
        qkv = self.qkv(kernels.rms_norm(x, self.norm, self.cfg.rms_eps))
        outs = self._outs_with_c(c, qkv, batch, k, v) if c else self._outs(qkv, batch, k, v)
        return self.o(outs[0] if len(outs) == 1 else torch.cat(outs))

    @cached_property
    def in_c(self) -> kernels.AttentionStruct:
        cfg, share = self.cfg, self.share
        return kernels.AttentionStruct(
            dtype=kernels.DTYPES[self.norm.dtype], hidden=cfg.hidden, heads=len(share.query), kv_heads=len(share.kv),
            width=cfg.head_dim, group=self.grid[1], skipped=share.pad_left, eps=cfg.rms_eps, norm=self.norm,
            qkv=self.qkv.weight, qkv_bias=self.qkv.bias, q_norm=self.q_norm if cfg.qk_norm else None,
            k_norm=self.k_norm if cfg.qk_norm else None, o=self.o.weight,
        )  # fmt: skip

    @cached_property
    def by_tiles(self) -> bool:
        return kernels.by_tiles(self.norm.dtype, self.cfg.hidden, self.cfg.head_dim)

    def in_one_call(self, x: torch.Tensor, batch: Batch) -> Any:
        """The library, if all of this is one call into C."""
        fits = batch.size % kernels.TOKENS == 0 and not batch.pieces
        return kernels.suiting(x, math.inf if self.by_tiles else kernels.ROWS) if fits else None

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v, each (n, heads, d), of all three side by side."""
        n_q, n_kv = len(self.share.query), len(self.share.kv)
        return qkv.view(-1, n_q + 2 * n_kv, self.cfg.head_dim).split((n_q, n_kv, n_kv), dim=1)

    def _outs_with_c(
        self, c: Any, qkv: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor
    ) -> list[torch.Tensor]:
        """What the heads here give, (n, heads x d) each, for one part of the batch after the other."""
        outs = []
        if batch.singles:
            outs.append(kernels.singles(c, self.in_c, batch.singles_in_c, qkv, k, v))
        if batch.pieces:
            rest = qkv[batch.singles :]
            kernels.prepare(c, self.in_c, batch.pieces_in_c, rest, k, v)
            q, new_k, new_v = self._heads(rest)
            for rows, start, table in batch.pieces:
                if self.by_tiles or math.isinf(kernels.ROWS):
                    outs.append(kernels.piece(c, self.in_c, batch.pieces_in_c, rows, start, table, rest, k, v))
                else:
                    outs.append(self._piece(q[rows], new_k[rows], new_v[rows], k, v, start, table))
        return outs

    def _outs(self, qkv: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """The same in PyTorch."""
        q, new_k, new_v = self._heads(qkv)
        qk = qkv.view(len(qkv), -1, self.cfg.head_dim)[:, : -new_v.shape[1]]
        if self.cfg.qk_norm:
            normed = ((q, self.q_norm), (new_k, self.k_norm))
            qk = torch.cat([kernels.rms_norm(t, weight, self.cfg.rms_eps) for t, weight in normed], dim=1)
        q, new_k = rotate(qk, *batch.rope).tensor_split([q.shape[1]], dim=1)  # both at once: fewer kernels on a GPU
        for cache, new in ((k, new_k), (v, new_v)):
            cache.view(-1, *new.shape[1:]).index_copy_(0, batch.slots, new)
        s = batch.singles
        outs = [self._singles(q[:s], k, v, batch)] if s else []
        q, new_k, new_v = q[s:], new_k[s:], new_v[s:]
        return outs + [self._piece(q[r], new_k[r], new_v[r], k, v, start, table) for r, start, table in batch.pieces]

    def _whole_groups(self, q: torch.Tensor) -> torch.Tensor:
        """Fills up groups that this rank holds only in part, so that the heads are a grid of (kv heads, group)."""
        share = self.share
        return F.pad(q, (0, 0, share.pad_left, share.pad_right)) if share.pad_left or share.pad_right else q

    def _own(self, out: torch.Tensor) -> torch.Tensor:
        """(n, heads of whole groups, d) -> (n, heads here x d)."""
        return out[:, self.share.pad_left : self.share.pad_left + len(self.share.query)].flatten(1)

    def _singles(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One token of each sequence, all at once. A group's query heads share K and V like rows of one query."""
        keys, values = (
            _blocks(t, batch.tables).view(batch.singles, -1, *t.shape[2:])[:, : batch.context].transpose(1, 2)
            for t in (k, v)
        )  # (B, kv, context, d)
        grid = self._whole_groups(q).reshape(-1, *self.grid, self.cfg.head_dim)  # (B, kv, group, d)
        out = F.scaled_dot_product_attention(grid, keys, values, attn_mask=batch.mask)
        return self._own(out.flatten(1, 2))

    def _piece(
        self, q: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int,
        table: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """A piece of one prompt. The first attends to itself, so the new K and V are all there is to read; a later one also to
        what the cache has."""
        mask = None
        if start:
            new_k, new_v = (_blocks(t, table).flatten(0, 1)[: start + len(q)] for t in (k, v))
            mask = torch.ones(len(q), len(new_k), dtype=torch.bool, device=q.device).tril(start)
        qs, ks, vs = (t.transpose(0, 1).unsqueeze(0) for t in (self._whole_groups(q), new_k, new_v))  # (1, heads, n, d)
        out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self._own(out.squeeze(0).transpose(0, 1))


def _blocks(cache: torch.Tensor, which: torch.Tensor | None) -> torch.Tensor:
    """A copy of some blocks of a layer's K or V. (index_select is faster than an index.)"""
    assert which is not None, "there are tokens that look into the cache"
    return cache.index_select(0, which.flatten())


def _scaled(part: range, by: int) -> range:
    return range(part.start * by, part.stop * by)
