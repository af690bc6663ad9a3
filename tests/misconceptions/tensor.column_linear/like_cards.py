"""columns are dealt out like cards"""

import torch.nn.functional as F


def column_linear(x, weight, comm):
    return F.linear(x, weight[comm.rank :: comm.world_size])
