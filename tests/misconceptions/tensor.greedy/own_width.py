"""each rank counts from rank x its own width"""

import torch


def greedy(scores, vocab, comm):
    start = comm.rank * scores.shape[1]
    best, at = scores.float().max(dim=1)
    pairs = comm.all_gather(torch.stack([best.double(), (at + start).double()]))
    winner = pairs[:, 0].argmax(dim=0)
    return pairs[winner, 1, torch.arange(len(winner))].long()
