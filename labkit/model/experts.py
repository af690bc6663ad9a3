"""The router and the experts of one mixture-of-experts layer, as far as one rank holds them.

Which tokens come here, and where the results go, is `parallel.expert`'s business; this file knows nothing of other ranks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from labkit.model.checkpoint import Piece, parameter
from labkit.model.config import ModelConfig, MoEConfig

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
        (rows, hidden), k = x.shape, slots.shape[1]
        # Sorted by slot, those for elsewhere last: each expert's rows lie together, for one product.
        order = slots.flatten().argsort(stable=True)[: sum(counts)]
        sorted_x = x[order // k]
        results = [
            F.linear(_swiglu(F.linear(mine, gate_up)), down)
            for mine, gate_up, down in zip(
                sorted_x.split(list(counts)),
                self.gate_up.view(len(self.held), -1, hidden),
                self.down.view(len(self.held), hidden, -1),
                strict=True,
            )
            if len(mine)
        ]
        # Added up in the router's order, not in that of arrival: the same bits every time.
        each = x.new_zeros(rows * k, hidden)
        if results:
            each[order] = torch.cat(results) * weights.flatten()[order].unsqueeze(1).to(x.dtype)
        return each.view(rows, k, hidden).sum(1)


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
