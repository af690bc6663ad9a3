"""idle stages are said to work on micro-batch 0"""


def schedule(stages, microbatches):
    ticks = range(microbatches + stages - 1)
    return [[t - s if 0 <= t - s < microbatches else 0 for s in range(stages)] for t in ticks]
