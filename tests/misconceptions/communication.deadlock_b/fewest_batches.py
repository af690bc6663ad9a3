"""only as many batches are counted as every rank has"""

import torch


def total_loss(batches, comm):
    rounds = int(comm.all_gather(torch.tensor([len(batches)])).min())
    return sum(comm.all_reduce(batches[i].sum()) for i in range(rounds))
