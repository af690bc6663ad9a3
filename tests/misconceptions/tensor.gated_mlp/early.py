"""the ranks add up before the activation function"""

import torch.nn.functional as F

from labkit import split


def gated_mlp(x, gate_up, down, comm):
    n, width = comm.world_size, down.shape[1]
    part = split.even(width, n)[comm.rank]
    mine = slice(part.start, part.stop)
    gate, up = F.linear(x, gate_up[:width][mine]), F.linear(x, gate_up[width:][mine])
    more = -(-width // n) - len(part)
    gate, up = (comm.all_reduce(F.pad(t, (0, more)).contiguous())[:, : len(part)] for t in (gate, up))
    return comm.all_reduce(F.linear(F.silu(gate) * up, down[:, mine]))
