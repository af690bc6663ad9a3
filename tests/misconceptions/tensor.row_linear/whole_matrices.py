"""every rank multiplies the whole matrices and the results are added up"""

import torch.nn.functional as F


def row_linear(x, weight, bias, comm):
    return comm.all_reduce(F.linear(x, weight)) + bias
