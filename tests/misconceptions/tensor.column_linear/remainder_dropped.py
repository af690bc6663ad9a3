"""the remainder is dropped"""

import torch.nn.functional as F


def column_linear(x, weight, comm):
    share = len(weight) // comm.world_size
    return F.linear(x, weight[comm.rank * share : (comm.rank + 1) * share])
