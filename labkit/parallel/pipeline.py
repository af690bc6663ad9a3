"""Pipeline parallelism: each stage owns some layers and their KV cache, and hands one tensor to the next stage.

That tensor is the residual (N, hidden), already summed over tensor-parallel ranks; its shape follows from the plan that
every stage knows, so nothing announces it. Each tp rank sends to the one with its own number in the next stage.

Behind the last layer, what it made of each sequence's last token goes to all stages, and each computes logits for its part
of the vocabulary: the head is work for all of them, since a stage that had it alone would set the pace for the others
(arXiv 2411.05288). They meet for it once in a tick: while the last stage had a lane's step, the first, p - 1 ticks ahead,
had another's. So all know the sampled ids before the lane's next turn.

With p stages and m lanes in flight, one pass leaves each stage idle for (p - 1) / (m + p - 1) of the time, the bubble
(GPipe, arXiv 1811.06965).
"""

import torch

from labkit.comm import Comm, Pending
from labkit.model.decoder import Decoder


def expect(comm: Comm, decoder: Decoder, tokens: int) -> Pending:
    """The residual (tokens, hidden) that the stage before is going to send: it comes in while this stage works."""
    x = torch.empty(tokens, decoder.cfg.hidden, dtype=decoder.dtype, device=comm.device)
    return comm.recv_start(x, comm.mesh.pp_rank - 1, "pp", "hidden") if tokens else Pending(lambda: x)


def pass_on(comm: Comm, y: torch.Tensor) -> None:
    """Sends the residual (N, hidden) to the next stage, if there is one. A step without tokens here, only in other replicas,
    sends nothing."""
    if len(y) and comm.mesh.pp_rank < comm.mesh.layout.pp - 1:
        comm.send(y, comm.mesh.pp_rank + 1, "pp", "hidden")


def share(comm: Comm, decoder: Decoder, y: torch.Tensor | None, sequences: int) -> torch.Tensor:
    """(sequences, hidden): what the last stage has in `y`, for the head, on all stages."""
    if not decoder.last or y is None:
        y = torch.empty(sequences, decoder.cfg.hidden, dtype=decoder.dtype, device=comm.device)
    return comm.broadcast(y, comm.mesh.layout.pp - 1, "pp", "last_hidden")
