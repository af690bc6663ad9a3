"""each rank gets the x of the rank after it"""

import torch


def pass_on(x, comm):
    comm.send(x, (comm.rank - 1) % comm.world_size)
    return comm.recv(torch.empty_like(x), (comm.rank + 1) % comm.world_size)
