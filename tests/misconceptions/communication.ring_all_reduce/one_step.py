"""only one step is taken"""

import torch


def ring_all_reduce(x, comm):
    n, r = comm.world_size, comm.rank
    comm.send(x, (r + 1) % n)
    return x + comm.recv(torch.empty_like(x), (r - 1) % n)
