"""every rank computes the whole product"""

import torch.nn.functional as F


def column_linear(x, weight, comm):
    return F.linear(x, weight)
