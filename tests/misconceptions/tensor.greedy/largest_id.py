"""the largest id wins instead of the id of the largest score"""

import torch

from labkit import split


def greedy(scores, vocab, comm):
    start = split.even(vocab, comm.world_size)[comm.rank].start
    best, at = scores.float().max(dim=1)
    pairs = comm.all_gather(torch.stack([best.double(), (at + start).double()]))
    return pairs[:, 1].amax(dim=0).long()
