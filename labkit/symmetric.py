"""PyTorch's symmetric memory between the GPUs of one host: a one-shot all-reduce for the small messages of decode.

Each rank copies its part into a buffer that the other GPUs can read, and one kernel adds all of them up: one step, where a
ring takes 2 (n - 1). NCCL carries everything else. It has not yet run on a real GPU; so each group tries it once against
NCCL when it starts, and does without it if anything differs.
"""

from typing import Any

import torch
import torch.distributed as dist

from labkit.mesh import Mesh

LARGEST = 128 * 1024  # bytes; beyond, n - 1 times the payload costs more than a ring's steps
ALIGNED = 16  # bytes that the kernel moves at a time
DTYPES = (torch.float32, torch.bfloat16)


def join(mesh: Mesh) -> "dict[str, SymmetricMemory]":
    """For each axis of `mesh` within a host on which it works, a buffer. Collective: every rank calls it once."""
    joined = {}
    for axis in ("tp", "pp", "dp", "ep"):
        if mesh.size(axis) > 1 and mesh.on_one_host(axis):
            memory: SymmetricMemory | None = None
            try:
                memory = SymmetricMemory(mesh, axis)
                works = memory.agrees_with_nccl()
            except Exception:  # no peer access, another driver, an older torch: NCCL will do
                works = False
            verdict = torch.tensor(int(works), device=mesh.device)
            dist.all_reduce(verdict, op=dist.ReduceOp.MIN, group=mesh.group(axis))
            if memory and verdict.item():
                joined[axis] = memory
    return joined


class SymmetricMemory:
    """One group's buffers. `takes` says which operations it does; it has `labkit.shm.SharedMemory`'s `all_reduce`."""

    def __init__(self, mesh: Mesh, axis: str) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        group: Any = mesh.group(axis)
        self._group = group
        self._buffer = symmetric.empty(LARGEST, dtype=torch.uint8, device=mesh.device)
        symmetric.rendezvous(self._buffer, group.group_name)

    def takes(self, op: str, x: torch.Tensor) -> bool:
        small = 0 < x.nbytes <= LARGEST and x.nbytes % ALIGNED == 0
        return op == "all_reduce" and small and x.dtype in DTYPES and x.is_contiguous()

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        mine = self._buffer[: x.nbytes].view(x.dtype)
        mine.copy_(x.view(-1))
        x.view(-1).copy_(torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", self._group.group_name))

    def agrees_with_nccl(self) -> bool:
        """Whether a sum is NCCL's, and has the same bits on every rank."""
        x = torch.randn(1024, device=self._buffer.device)
        sums = x.clone()
        dist.all_reduce(sums, group=self._group)
        self.all_reduce(x)
        firsts = [torch.empty_like(x) for _ in range(self._group.size())]
        dist.all_gather(firsts, x, group=self._group)
        return torch.allclose(x, sums, rtol=1e-4, atol=1e-4) and all(torch.equal(first, x) for first in firsts)
