"""each rank takes the best of its own part"""

from labkit import split


def greedy(scores, vocab, comm):
    start = split.even(vocab, comm.world_size)[comm.rank].start
    at = scores.float().argmax(dim=1)
    return at + start
