"""One decoder-only transformer, cut to what a single rank holds: its stage's layers, and its share of each of them.

Written once for every family and layout. It knows how tensors are shared (through `parallel.tensor` and `Comm`), and
nothing of requests, sampling or files.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from labkit import split
from labkit.comm import Comm, Forward
from labkit.mesh import Alone, Layout
from labkit.model import kernels
from labkit.model.attention import Attention, Batch, KVCache, Rotary
from labkit.model.checkpoint import Piece, norm_weight, parameter
from labkit.model.config import ModelConfig
from labkit.parallel.expert import MoE, Spread
from labkit.parallel.tensor import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, VocabParallelHead


def check_layout(cfg: ModelConfig, layout: Layout, spread: Spread) -> None:
    """Raises LayoutError, naming the legal values, if the model can't be cut this way."""
    split.heads(cfg.heads, cfg.kv_heads, layout.tp)
    widths = {"intermediate_size": cfg.intermediate}
    if cfg.moe and layout.ep == 1:
        widths["the experts' intermediate size"] = cfg.moe.width
    for name, size in widths.items():
        if layout.tp > size:
            raise split.LayoutError(f"tensor_parallel_size={layout.tp} does not fit {name} {size}: use 1 to {size}")
    split.layers(cfg.layers, layout.pp)
    if layout.tp * layout.pp > cfg.vocab:
        raise split.LayoutError(
            f"tensor_parallel_size={layout.tp} x pipeline_parallel_size={layout.pp} does not fit vocab_size {cfg.vocab}, "
            f"of which each rank has a part: use at most {cfg.vocab} ranks"
        )
    if cfg.moe:
        for layer in filter(cfg.sparse, range(cfg.layers)):
            spread.of(layer, cfg.moe.experts, layout.ep)


def tensors(cfg: ModelConfig) -> list[Piece]:
    """What a checkpoint must hold: every tensor of the whole decoder, whole (one that is used twice, twice)."""
    whole = Decoder(cfg, Comm(Alone()), torch.float32)
    return [piece for p in whole.parameters() for piece in p.pieces]  # type: ignore[attr-defined]


class MLP(nn.Module):
    """What SwiGLU adds to the residual (N, hidden), behind a norm.

    Gate and up are column-parallel in one product, down is row-parallel.
    """

    def __init__(
        self, cfg: ModelConfig, prefix: str, norm: nn.Parameter, comm: Comm, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.norm, self.eps = norm, cfg.rms_eps
        full, hidden = cfg.intermediate, cfg.hidden
        part = split.even(full, comm.mesh.size("tp"))[comm.mesh.tp_rank]
        names = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        weights = [Piece(f"{name}.weight", (full, hidden), 0, part) for name in names]
        biases = [Piece(f"{name}.bias", (full,), 0, part) for name in names] if cfg.mlp_bias else []
        self.gate_up = ColumnParallelLinear(weights, biases, dtype, device)
        bias = Piece(f"{prefix}.down_proj.bias", (hidden,), 0, range(hidden)) if cfg.mlp_bias else None
        weight = Piece(f"{prefix}.down_proj.weight", (hidden, full), 1, part)
        self.down = RowParallelLinear(weight, bias, "mlp", dtype, device)

    def forward(self, x: torch.Tensor) -> Forward:
        if c := self.in_one_call(x):
            return self.down.reduce(kernels.mlp(c, self.in_c, x))
        return self.down(kernels.swiglu(self.gate_up(kernels.rms_norm(x, self.norm, self.eps))))

    @cached_property
    def in_c(self) -> kernels.MlpStruct:
        return kernels.MlpStruct(
            dtype=kernels.DTYPES[self.norm.dtype], hidden=self.norm.shape[0], inner=self.down.weight.shape[1],
            eps=self.eps, norm=self.norm, gate_up=self.gate_up.weight, gate_up_bias=self.gate_up.bias,
            down=self.down.weight,
        )  # fmt: skip

    @cached_property
    def by_tiles(self) -> bool:
        return kernels.by_tiles(self.norm.dtype, *self.down.weight.shape)

    def in_one_call(self, x: torch.Tensor) -> Any:
        """The library, if all of this is one call into C."""
        return kernels.suiting(x, math.inf if self.by_tiles else kernels.ROWS)


class Layer(nn.Module):
    """Attention and MLP, or experts, each behind a norm and added to the residual, in place.

    (`forward` is called itself, here and by the decoder: what nn.Module's call adds costs a step of SmolLM2 0.2 ms.)
    """

    def __init__(
        self, cfg: ModelConfig, number: int, comm: Comm, spread: Spread, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        prefix = f"model.layers.{number}"
        self.eps = cfg.rms_eps
        input_norm, self.post_norm = (
            norm_weight(f"{prefix}.{name}_layernorm.weight", cfg.hidden, dtype, device)
            for name in ("input", "post_attention")
        )
        self.attention = Attention(cfg, f"{prefix}.self_attn", input_norm, comm, dtype, device)
        self.moe = MoE(cfg, cfg.moe, number, comm, spread, dtype, device) if cfg.moe and cfg.sparse(number) else None
        self.mlp = None if self.moe else MLP(cfg, f"{prefix}.mlp", self.post_norm, comm, dtype, device)

    def forward(self, x: torch.Tensor, batch: Batch, k: torch.Tensor, v: torch.Tensor) -> Forward:
        some = x.shape[0] > 0
        if some:
            x += yield from self.attention.forward(x, batch, k, v)
        if self.moe:  # without tokens of its own too: others' come to the experts here
            x += yield from self.moe(kernels.rms_norm(x, self.post_norm, self.eps), batch.replicas)
        elif self.mlp and some:
            x += yield from self.mlp.forward(x)
        return x


class Decoder(nn.Module):
    """This rank's part. First stage: token ids in; others: the residual (N, hidden) of the stage before.

    Last stage: each sequence's last token out, (B, hidden), normed, which the `head` makes logits of; others: the residual.
    A forward yields at each communication point (`parallel.overlap` says who goes on from there), except where C goes through all
    layers of a decode step and meets the other ranks itself.
    """

    def __init__(self, cfg: ModelConfig, comm: Comm, dtype: torch.dtype, spread: Spread | None = None) -> None:
        super().__init__()
        spread = spread or Spread()
        self.comm = comm
        self.mesh = mesh = comm.mesh
        device = mesh.device
        self.cfg, self.dtype = cfg, dtype
        self.first, self.last = mesh.pp_rank == 0, mesh.pp_rank == mesh.layout.pp - 1
        numbers = split.layers(cfg.layers, mesh.layout.pp)[mesh.pp_rank]
        table, whole = "model.embed_tokens.weight", (cfg.vocab, cfg.hidden)
        if self.first:
            rows = split.even(cfg.vocab, mesh.layout.tp)[mesh.tp_rank]
            self.embed = VocabParallelEmbedding(Piece(table, whole, 0, rows), comm, dtype, device)
        self.rope = Rotary(cfg, device)
        layers = nn.ModuleList(Layer(cfg, i, comm, spread, dtype, device) for i in numbers)
        self.layers: Sequence[Layer] = layers  # type: ignore[assignment]
        if self.last:
            self.norm = norm_weight("model.norm.weight", cfg.hidden, dtype, device)
        self.head = VocabParallelHead(cfg.vocab, comm)
        if cfg.tied and self.first:  # the same memory
            self.head.weight = self.embed.weight[: len(self.head.rows)]
        else:
            piece = Piece(table if cfg.tied else "lm_head.weight", whole, 0, self.head.rows)
            self.head.weight = parameter([piece], dtype, device)

    @property
    def moes(self) -> dict[int, MoE]:
        """The mixture-of-experts blocks of this stage, by layer number."""
        return {layer.moe.number: layer.moe for layer in self.layers if layer.moe}

    @property
    def weights_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def cache(self, blocks: int, size: int) -> KVCache:
        """A KV cache for this stage's layers and this rank's KV heads: `blocks` blocks of `size` tokens."""
        kv_heads = len(split.heads(self.cfg.heads, self.cfg.kv_heads, self.mesh.layout.tp)[self.mesh.tp_rank].kv)
        return KVCache(
            len(self.layers), blocks, size, kv_heads, self.cfg.head_dim, dtype=self.dtype, device=self.mesh.device
        )

    def forward(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> Forward:
        if self.first:
            x = (yield from self.embed(x)) if len(x) else self.embed.weight[:0]
        batch.rope = self.rope.tables(batch.positions, self.dtype)
        if c := self.in_one_call(x, batch):
            kernels.layers(c, self.in_c, batch.singles_in_c, x, cache.in_c, self.comm)
        else:
            for layer, k, v in zip(self.layers, cache.k, cache.v, strict=True):
                x = yield from layer.forward(x, batch, k, v)
        return kernels.rms_norm(x[batch.last], self.norm, self.cfg.rms_eps) if self.last else x

    def in_one_call(self, x: torch.Tensor, batch: Batch) -> Any:
        """The library, if all layers are one call into C: dense ones, of which nothing is added behind the sum over ranks."""
        cfg, first = self.cfg, self.layers[0]
        if cfg.moe or cfg.out_bias or cfg.mlp_bias or not self.comm.can_reduce_in_c(x, "tp"):
            return None
        return first.mlp and first.mlp.in_one_call(x) and first.attention.in_one_call(x, batch)

    @cached_property
    def in_c(self) -> ctypes.Array[kernels.LayerStruct]:
        parts = [(layer.attention.in_c, layer.mlp.in_c) for layer in self.layers if layer.mlp]
        return (kernels.LayerStruct * len(parts))(*(kernels.LayerStruct(attention=a, mlp=m) for a, m in parts))
