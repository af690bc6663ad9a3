"""there is neither an all-reduce nor a bias"""

import torch.nn.functional as F

from labkit import split


def row_linear(x, weight, bias, comm):
    part = split.even(weight.shape[1], comm.world_size)[comm.rank]
    return F.linear(x[:, part.start : part.stop], weight[:, part.start : part.stop])
