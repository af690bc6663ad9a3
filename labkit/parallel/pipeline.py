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


def pass_on(comm: Comm, y: torch.Tensor, sampled: torch.Tensor | None, room: torch.Tensor) -> Pending:
    """Sends the residual to the next stage, and what the last one `sampled` to all. Gives that, later.

    room: a tensor like it, where it can be received. A step without tokens here, only in other replicas, sends nothing, and
    neither does a last stage that sampled nothing, for pieces of prompts.
    """
    last = comm.mesh.layout.pp - 1
    if len(y) and comm.mesh.pp_rank < last:
        comm.send(y, comm.mesh.pp_rank + 1, "pp", "hidden")
    if not len(room):
        return Pending(lambda: room)
    return comm.broadcast_start(room if sampled is None else sampled, last, "pp", "ids")
