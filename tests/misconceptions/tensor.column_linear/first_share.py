"""all ranks take the first share"""

import torch.nn.functional as F

from labkit import split


def column_linear(x, weight, comm):
    rows = split.even(len(weight), comm.world_size)[0]
    return F.linear(x, weight[rows.start : rows.stop])
