"""Expert parallelism: the experts of a layer live on different ranks, and tokens meet them there (GShard, arXiv 2006.16668).

The ranks of a pipeline stage, in all its replicas, share out the experts: the axis "ep", dp x tp ranks. Attention stays as it
is, so each replica comes with tokens of its own, which its tp ranks all have. Three ways to bring tokens and experts together:

- "all_reduce": every rank gets every token, computes what its own experts add, and one all-reduce sums up. With one replica
  all ranks have all tokens anyway; several gather them first.
- "all_gather": each rank begins with its own part of the tokens; an all-gather shows them to all, a reduce-scatter brings
  back to each rank the sums of its own.
- "all_to_all": each token goes only to the ranks that hold its experts (dispatch), once to each, and what they made of it
  comes back and is added up (combine). Before, everybody learns from one small all-gather (counts) which experts each token
  wants, so that all know who sends how many rows to whom.

A rank without tokens takes part with zero rows. Where an "ep" group is one rank (no expert parallelism), each expert's
matrices are cut over "tp" instead, like a dense MLP's, for one all-reduce.

Row counts depend on the router, so the host has to look at them: once per layer and step, at `self.look` below.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from labkit import split
from labkit.comm import Comm, Exchange, Forward
from labkit.model.config import ModelConfig, MoEConfig
from labkit.model.experts import Experts, Router

EXCHANGES = ("all_to_all", "all_gather", "all_reduce")


@dataclass(frozen=True)
class Spread:
    """How experts are spread. placement: "contiguous", "round-robin", or by layer the experts of each rank of "ep"."""

    exchange: str = "all_to_all"
    placement: str | Mapping[int, Sequence[Sequence[int]]] = "contiguous"

    def of(self, layer: int, experts: int, ranks: int) -> list[list[int]]:
        """The experts of each rank in `layer`. Raises LayoutError for a placement that isn't one."""
        if isinstance(self.placement, str):
            return split.experts(experts, ranks, self.placement)
        placed = [list(mine) for mine in self.placement.get(layer, split.experts(experts, ranks))]
        if len(placed) != ranks or sorted(e for mine in placed for e in mine) != list(range(experts)) or [] in placed:
            raise split.LayoutError(
                f"expert placement {placed} of layer {layer}: {ranks} lists (dp x tp ranks) are needed, none of them empty, "
                f"that hold each expert from 0 to {experts - 1} once"
            )
        return placed


class MoE(nn.Module):
    """The mixture-of-experts block of a layer: (N, hidden) -> (N, hidden), this replica's tokens, on all its tp ranks.

    `load` (experts,) counts the tokens that asked for each expert, each token on one rank only.
    """

    def __init__(
        self, cfg: ModelConfig, moe: MoEConfig, layer: int, comm: Comm, spread: Spread, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        self.comm, self.mesh, self.moe = comm, comm.mesh, moe
        self.number = layer
        self.ranks = self.mesh.size("ep")
        self.placement = spread.of(layer, moe.experts, self.ranks)
        held, width = self.placement[self.mesh.index("ep")], range(moe.width)
        if self.ranks == 1:
            width = split.even(moe.width, self.mesh.size("tp"))[self.mesh.tp_rank]
        self.router = Router(cfg, moe, f"model.layers.{layer}", dtype, device)
        self.experts = Experts(cfg, moe, f"model.layers.{layer}", held, width, dtype, device)
        owner, slot = [self.ranks] * (moe.experts + 1), [len(held)] * (moe.experts + 1)  # the last: no expert
        for rank, mine in enumerate(self.placement):
            for e in mine:
                owner[e] = rank
        for i, e in enumerate(held):
            slot[e] = i
        self.owner, self.slot = torch.tensor(owner, device=device), torch.tensor(slot, device=device)
        self.look: Callable[[torch.Tensor], list[int]] = torch.Tensor.tolist  # a dry run puts here what it assumes
        self.load = torch.zeros(moe.experts, dtype=torch.int64, device=device)
        self.exchange = {
            "all_reduce": self._all_reduce,
            "all_gather": self._all_gather,
            "all_to_all": self._all_to_all,
        }[spread.exchange]

    def forward(self, x: torch.Tensor, replicas: Sequence[int]) -> Forward:
        """replicas: how many tokens each replica has in this step; [N] where replicas go their own ways."""
        if self.ranks > 1:
            return self.exchange(x, replicas)
        experts, weights = self.router(x)
        self._count(self._mine(experts))
        return (yield Exchange("all_reduce", self._compute(x, experts, weights), "tp", "mlp"))

    # -- the three ways ------------------------------------------------------------------------------------------------

    def _all_reduce(self, x: torch.Tensor, replicas: Sequence[int]) -> torch.Tensor:
        everything = self._everyones(x, replicas, "dp", "dispatch")
        experts, weights = self.router(everything)
        start = sum(replicas[: self.mesh.index("dp")]) if len(replicas) > 1 else 0
        self._count(self._mine(experts[start : start + len(x)]))
        y = self.comm.all_reduce(self._compute(everything, experts, weights), "ep", "combine")
        return y[start : start + len(x)]

    def _all_gather(self, x: torch.Tensor, replicas: Sequence[int]) -> torch.Tensor:
        sizes, mine = self.sizes(replicas), self._mine(x)
        rows = max(sizes)
        padded = self.comm.all_gather(_pad(mine, rows), "ep", "dispatch").flatten(0, 1)  # (ep x rows, hidden)
        experts, weights = self.router(padded)
        self._count(experts[self.mesh.index("ep") * rows :][: len(mine)])
        there = torch.arange(rows, device=x.device) < torch.tensor(sizes, device=x.device).unsqueeze(1)  # (ep, rows)
        experts = experts.where(there.view(-1, 1), self.moe.experts)  # what fills up wants no expert
        y = self.comm.reduce_scatter(self._compute(padded, experts, weights), "ep", "combine")[: len(mine)]
        return self._everyones(y, self.sizes([len(x)]), "tp", "tokens")

    def _all_to_all(self, x: torch.Tensor, replicas: Sequence[int]) -> torch.Tensor:
        sizes, mine = self.sizes(replicas), self._mine(x)
        me, rows, k = self.mesh.index("ep"), max(sizes), self.moe.per_token
        experts, weights = self.router(mine)
        self._count(experts)
        # What each token of each rank wants: experts and weights side by side; float32 holds whole numbers up to 2^24.
        wish = _pad(torch.cat([experts.float(), weights], dim=1), rows, value=self.moe.experts)
        wishes = self.comm.all_gather(wish, "ep", "counts")  # (ep, rows, 2k)
        experts, weights = wishes[..., :k].long(), wishes[..., k:]
        goes = (self.owner[experts].unsqueeze(2) == torch.arange(self.ranks, device=x.device).view(-1, 1)).any(3)
        slots = self.slot[experts].view(-1, k)
        # The host's one look in this layer: how many rows go from each rank to each, and how many each expert here gets.
        counts = self.look(torch.cat([goes.sum(1).flatten(), self._per_slot(slots)]))  # goes: (ep, rows, ep)
        table = [counts[i : i + self.ranks] for i in range(0, self.ranks**2, self.ranks)]
        send, receive = table[me], [row[me] for row in table]
        # My tokens by destination: of the table (ep, rows), read row by row, place `to * rows + token` is this token, for rank
        # `to`. Its experts on one rank make one row.
        sent = _where(goes[me].T, sum(send)) % rows
        came = _where(goes[:, :, me], sum(receive))  # by source, those that come: rows of `slots`
        arrived = self.comm.all_to_all(mine.index_select(0, sent), send, receive, "ep", "dispatch")
        wanted = (each.view(-1, k).index_select(0, came) for each in (slots, weights))
        y = self.experts(arrived, *wanted, counts[self.ranks**2 :])
        back = self.comm.all_to_all(y, receive, send, "ep", "combine")
        summed = torch.zeros_like(mine).index_add_(0, sent, back)
        return self._everyones(summed, self.sizes([len(x)]), "tp", "tokens")

    # -- what they share -----------------------------------------------------------------------------------------------

    def _compute(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the experts here add to every row of `x`."""
        slots = self.slot[experts]
        return self.experts(x, slots, weights, self.look(self._per_slot(slots)))

    def _per_slot(self, slots: torch.Tensor) -> torch.Tensor:
        return _histogram(slots, len(self.experts.held) + 1)[:-1]

    def _count(self, experts: torch.Tensor) -> None:
        self.load += _histogram(experts, self.moe.experts)

    def _mine(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of what all tp ranks of its replica have."""
        part = split.even(len(x), self.mesh.size("tp"))[self.mesh.tp_rank]
        return x[part.start : part.stop]

    def sizes(self, replicas: Sequence[int]) -> list[int]:
        """Tokens of each rank of these replicas: its part of its replica's."""
        return [len(part) for tokens in replicas for part in split.even(tokens, self.mesh.size("tp"))]

    def _everyones(self, x: torch.Tensor, sizes: Sequence[int], axis: str, what: str) -> torch.Tensor:
        """The rows of all ranks along `axis`, of which each brings as many as `sizes` says, one after the other."""
        if self.mesh.size(axis) == 1 or not any(sizes):
            return x
        parts = self.comm.all_gather(_pad(x, max(sizes)), axis, what)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _pad(x: torch.Tensor, rows: int, value: float = 0.0) -> torch.Tensor:
    """All-gather and reduce-scatter want as many rows from each rank."""
    return F.pad(x, (0, 0, 0, rows - len(x)), value=value)


def _where(mask: torch.Tensor, count: int) -> torch.Tensor:
    """The flat positions of the `count` true values, in order. (Unlike nonzero, without asking the device for their number.)"""
    return mask.flatten().logical_not().argsort(stable=True)[:count]


def _histogram(numbers: torch.Tensor, size: int) -> torch.Tensor:
    flat = numbers.flatten()
    return torch.zeros(size, dtype=torch.int64, device=flat.device).index_add_(0, flat, torch.ones_like(flat))
