"""the circle is cut open: rank 0 receives nothing"""

import torch


def pass_on(x, comm):
    if comm.rank + 1 < comm.world_size:
        comm.send(x, comm.rank + 1)
    return comm.recv(torch.empty_like(x), comm.rank - 1) if comm.rank else x
