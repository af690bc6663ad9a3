"""each rank sends on what it has just received"""

import torch


def pass_on(x, comm):
    received = comm.recv(torch.empty_like(x), comm.rank - 1) if comm.rank else x
    if comm.rank + 1 < comm.world_size:
        comm.send(received, comm.rank + 1)
    return received
