"""ids travel in the 16 bits of the scores"""

import torch

from labkit import split


def greedy(scores, vocab, comm):
    start = split.even(vocab, comm.world_size)[comm.rank].start
    best, at = scores.float().max(dim=1)
    pairs = comm.all_gather(torch.stack([best.half(), (at + start).half()]))
    winner = pairs[:, 0].argmax(dim=0)
    return pairs[winner, 1, torch.arange(len(winner))].long()
