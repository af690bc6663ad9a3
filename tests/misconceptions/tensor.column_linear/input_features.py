"""the input features are cut instead of the output features"""

import torch.nn.functional as F

from labkit import split


def column_linear(x, weight, comm):
    part = split.even(weight.shape[1], comm.world_size)[comm.rank]
    return F.linear(x[:, part.start : part.stop], weight[:, part.start : part.stop])
