"""The router and the experts of one mixture-of-experts layer, as far as one rank holds them.

Which tokens come here, and where the results go, is `parallel.expert`'s business; this file knows nothing of other ranks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from labkit.model.checkpoint import Piece, parameter
from labkit.model.config import ModelConfig, MoEConfig
from labkit.model.kernels import linear, swiglu, widens

# Names in the checkpoint: the block, and an expert's gate, up and down matrices.
NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


class Router(nn.Module):
    """(N, hidden) -> the experts (N, k) of each token, best first, and their weights (N, k) in float32."""

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, layer: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.moe = moe
        piece = Piece(f"{layer}.{NAMES[cfg.family][0]}.gate.weight", (moe.experts, cfg.hidden), 0, range(moe.experts))
        self.weight = parameter([piece], dtype, device)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = F.linear(x, self.weight).float().softmax(-1).topk(self.moe.per_token)
        return experts, weights / weights.sum(-1, keepdim=True) if self.moe.normalise else weights


class Experts(nn.Module):
    """SwiGLU MLPs: those numbered `held`, of each the inner features `part`. Called "slot" below: an index into `held`."""

    def __init__(
        self, cfg: ModelConfig, moe: MoEConfig, layer: str, held: Sequence[int], part: range, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        block, (gate, up, down) = NAMES[cfg.family]
        self.held, width, hidden = list(held), moe.width, cfg.hidden
        names = [f"{layer}.{block}.experts.{e}" for e in held]
        ins = [Piece(f"{name}.{w}.weight", (width, hidden), 0, part) for name in names for w in (gate, up)]
        self.gate_up = parameter(ins, dtype, device)  # (slots x 2 x part, hidden)
        outs = [Piece(f"{name}.{down}.weight", (hidden, width), 1, part) for name in names]
        self.down = parameter(outs, dtype, device)  # (slots x hidden, part)

    def forward(
        self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """Of each row of `x` (R, hidden) the weighted sum over its experts here: (R, hidden), zeros where it has none.

        slots, weights (R, k): a row's experts as slots, len(held) for one that is elsewhere, and their weights.
        counts: how many rows each slot has; known by the caller, who has to look at numbers on the host anyway.
        """
        hidden, k = x.shape[1], slots.shape[1]
        # Sorted by slot, those for elsewhere last: each expert's rows lie together, for one grouped product.
        order = slots.flatten().argsort(stable=True)[: sum(counts)]
        rows = order // k
        inner = swiglu(_grouped(x.index_select(0, rows), self.gate_up.view(len(self.held), -1, hidden), counts))
        results = _grouped(inner, self.down.view(len(self.held), hidden, -1), counts)
        weighted = results * weights.flatten()[order].unsqueeze(1).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, rows, weighted)


def _grouped(x: torch.Tensor, weights: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The first counts[0] rows of x (R, in) times weights[0] of (slots, out, in), the next counts[1] times weights[1], ..."""
    aligned = all(n * x.element_size() % 16 == 0 for n in weights.shape[1:])  # what PyTorch's grouped product asks for
    if aligned and len(x) and not widens(x):
        ends = torch.tensor(counts, device=x.device).cumsum(0).int()
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    return torch.cat([linear(mine, weight) for mine, weight in zip(x.split(list(counts)), weights, strict=True)])
