"""Three ways to add up a tensor over ranks, written out on sends, receives and all-gathers, to be counted and timed.

With n ranks, a payload of S bytes, and t = alpha + bytes / beta for one message, where alpha is its latency:

| | steps | bytes that a rank sends | time |
|---|---|---|---|
| ring | 2 (n - 1) | 2 (n - 1) / n S | 2 (n - 1) alpha + 2 (n - 1) / n S / beta |
| one-shot | 1 | (n - 1) S | alpha + (n - 1) S / beta |
| two-shot | 2 | 2 (n - 1) / n S | 2 alpha + 2 (n - 1) / n S / beta |

Small messages want few steps, large ones few bytes (Thakur et al. 2005, doi:10.1177/1094342005051521). A two-shot's message
goes to n - 1 ranks at once, a ring's to one neighbour, which is why rings are for networks in which such crowds collide.
"""

import torch

from labkit.comm import Comm


def ring(x: torch.Tensor, comm: Comm, axis: str = "world") -> torch.Tensor:
    """Sum of `x` (any shape) over the ranks of `axis`: chunks go round, first adding up, then spreading the sums."""
    n, me = comm.mesh.size(axis), comm.mesh.index(axis)
    chunks = list(x.flatten().clone().tensor_split(n))  # of equal length, or one more
    right, left = (me + 1) % n, (me - 1) % n
    for step in range(2 * (n - 1)):
        adding = step < n - 1
        mine, theirs = (me - step) % n, (me - step - 1) % n  # the chunk to pass on, and the one that comes in
        comm.send(chunks[mine], right, axis, "ring")
        received = comm.recv(torch.empty_like(chunks[theirs]), left, axis, "ring")
        # A new tensor, not += : what has been sent must not change before it has left.
        chunks[theirs] = chunks[theirs] + received if adding else received
    return torch.cat(chunks).view(x.shape)


def one_shot(x: torch.Tensor, comm: Comm, axis: str = "world") -> torch.Tensor:
    """Sum of `x` over the ranks of `axis`: everybody gets everything, and adds it up."""
    return comm.all_gather(x, axis, "one-shot").sum(dim=0, dtype=x.dtype)


def two_shot(x: torch.Tensor, comm: Comm, axis: str = "world") -> torch.Tensor:
    """Sum of `x` over the ranks of `axis`: everybody adds up a share, then everybody gets all the sums."""
    n = comm.mesh.size(axis)
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % n))
    sums = comm.reduce_scatter(flat, axis, "two-shot")
    return comm.all_gather(sums, axis, "two-shot").flatten()[: x.numel()].view(x.shape)


ALGORITHMS = {"ring": ring, "one-shot": one_shot, "two-shot": two_shot}
