"""Pipeline parallelism: each stage owns some layers and their KV cache, and hands one tensor to the next stage.

That tensor is the residual (N, hidden), already summed over tensor-parallel ranks; its shape follows from the plan that
every stage knows, so nothing announces it. Each tp rank sends to the one with its own number in the next stage. The ids
that the last stage samples go back to all stages, while they work on other lanes: nobody waits before the lane's next turn.

With p stages and m lanes in flight, one pass leaves each stage idle for (p - 1) / (m + p - 1) of the time, the bubble
(GPipe, arXiv 1811.06965).
"""

import torch

from labkit.comm import Comm, Pending
from labkit.model.decoder import Decoder


def receive(comm: Comm, ids: torch.Tensor, decoder: Decoder) -> torch.Tensor:
    """What this stage's layers work on: the step's ids (N,) on the first stage, else the residual (N, hidden) sent to it."""
    if decoder.first:
        return ids
    x = torch.empty(len(ids), decoder.cfg.hidden, dtype=decoder.dtype, device=comm.device)
    return comm.recv(x, comm.mesh.pp_rank - 1, "pp", "hidden") if len(ids) else x


def pass_on(comm: Comm, y: torch.Tensor, ids: torch.Tensor | None, sequences: int) -> Pending:
    """Sends the residual to the next stage, or, from the last one, the sampled ids (B,) to all. Gives the ids, later.

    A step without tokens here, only in other replicas, sends nothing.
    """
    if not sequences:
        return Pending(lambda: torch.empty(0, dtype=torch.int64, device=comm.device))
    if ids is None:
        comm.send(y, comm.mesh.pp_rank + 1, "pp", "hidden")
        ids = torch.empty(sequences, dtype=torch.int64, device=comm.device)
    return comm.broadcast_start(ids, comm.mesh.layout.pp - 1, "pp", "ids")
