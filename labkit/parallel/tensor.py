"""Tensor parallelism: one layer's matrices cut over the ranks of the "tp" axis (Megatron-LM, arXiv 1909.08053).

- A *column-parallel* product X W keeps some of W's output features on each rank: no communication, each rank ends with
  its own part of the result.
- A *row-parallel* product takes such a part as its input: each rank ends with a partial sum of the whole result, and one
  all-reduce adds them up.

Column then row is one all-reduce for two products. A transformer layer has two such pairs, (q k v -> o) and (gate up ->
down), so two all-reduces at any degree; the degree changes the bytes. Embedding and output head are cut by vocabulary; the head
over the stages of a pipeline too, which would otherwise wait for the last one (vocabulary parallelism, arXiv 2411.05288).

As in PyTorch, a weight is stored (out_features, in_features): W's columns are the rows of the stored tensor.
"""

import torch
import torch.nn.functional as F
from torch import nn

from labkit import split
from labkit.comm import Comm, Exchange, Forward
from labkit.model.checkpoint import Piece, parameter
from labkit.model.kernels import linear, top


class ColumnParallelLinear(nn.Module):
    """(N, in) -> (N, this rank's output features). Several projections of the same input may be fused into one product."""

    def __init__(self, weights: list[Piece], biases: list[Piece], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(weights, dtype, device)
        self.bias = parameter(biases, dtype, device) if biases else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """(N, this rank's input features) -> (N, out), the sum over ranks: one all-reduce, named `what` in the meter."""

    def __init__(self, weight: Piece, bias: Piece | None, what: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter([weight], dtype, device)
        self.bias = parameter([bias], dtype, device) if bias else None
        self.what = what

    def forward(self, x: torch.Tensor) -> Forward:
        return self.reduce(linear(x, self.weight))

    def reduce(self, partial: torch.Tensor) -> Forward:
        """(N, out), this rank's partial sum -> the sum over ranks."""
        y = yield Exchange("all_reduce", partial, "tp", self.what)
        return y if self.bias is None else y + self.bias  # after the sum, or it would be added tp times


class VocabParallelEmbedding(nn.Module):
    """Token ids (N,) -> (N, hidden). Each rank looks up the ids of its own rows, zeros elsewhere; one all-reduce joins them."""

    def __init__(self, table: Piece, comm: Comm, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter([table], dtype, device)
        self.rows = table.part
        self.comm = comm

    def forward(self, ids: torch.Tensor) -> Forward:
        if self.comm.mesh.size("tp") == 1:
            return F.embedding(ids, self.weight)
        mine = (ids >= self.rows.start) & (ids < self.rows.stop)
        found = F.embedding((ids - self.rows.start) * mine, self.weight) * mine.unsqueeze(1)
        return (yield Exchange("all_reduce", found, "tp", "embedding"))


class VocabParallelHead(nn.Module):
    """(B, hidden) -> logits (B, this rank's part of the vocabulary), in float32, since bfloat16's often tie: 25 and the next
    number are an eighth apart. What to do with the parts is the sampler's choice.

    Every rank of a replica has a part, `rows`: the tp ranks of each stage a share of what is cut over the stages.
    """

    weight: torch.Tensor  # (len(rows), hidden); whoever makes the head knows where it comes from

    def __init__(self, vocab: int, comm: Comm) -> None:
        super().__init__()
        self.comm, layout = comm, comm.mesh.layout
        self.parts = split.vocabulary(vocab, layout.tp, layout.pp)
        self.rows = self.parts[comm.mesh.tp_rank][comm.mesh.pp_rank]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, wide=True)

    def argmax(self, scores: torch.Tensor) -> torch.Tensor:
        """Ids (B,) of the highest score over the whole vocabulary, from each rank's part (B, part).

        Two numbers per row and rank are exchanged instead of the scores; float64 holds ids and float32 scores exactly.
        The first of equal scores wins, as torch.argmax does.
        """
        best, at = (t.squeeze(1) for t in top(scores, 1))
        pair = torch.stack([best.double(), (at + self.rows.start).double()])
        for axis in ("pp", "tp"):
            pairs = self.comm.all_gather(pair, axis, "logits")  # (ranks, 2, B)
            pair = pairs.gather(0, pairs[:, :1].argmax(dim=0, keepdim=True).expand(1, 2, -1)).squeeze(0)
        return pair[1].long()

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """The whole rows (B, vocab) from each rank's part (B, part), on every rank; where that is all, the same tensor."""
        shares = [range(parts[0].start, parts[-1].stop) for parts in self.parts]  # of the tp ranks, all stages together
        for axis, cut in (("pp", self.parts[self.comm.mesh.tp_rank]), ("tp", shares)):
            if len(cut) == 1:
                continue
            widest = max(map(len, cut))
            padded = F.pad(logits, (0, widest - logits.shape[1]))  # all-gather wants equal shapes
            parts = self.comm.all_gather(padded, axis, "logits")
            logits = torch.cat([part[:, : len(rows)] for part, rows in zip(parts, cut, strict=True)], dim=1)
        return logits
