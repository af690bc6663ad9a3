"""ranks that have run out repeat their last batch"""

import torch


def total_loss(batches, comm):
    rounds = int(comm.all_gather(torch.tensor([len(batches)])).max())
    return sum(comm.all_reduce(batches[min(i, len(batches) - 1)].sum()) for i in range(rounds))
