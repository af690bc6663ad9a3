"""micro-batches are counted from 1, and 0 means idle"""


def schedule(stages, microbatches):
    ticks = range(microbatches + stages - 1)
    return [[t - s + 1 if 0 <= t - s < microbatches else 0 for s in range(stages)] for t in ticks]
