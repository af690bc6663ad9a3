"""the table begins when the last stage has something to do"""


def schedule(stages, microbatches):
    ticks = range(stages - 1, microbatches + stages - 1)
    return [[t - s if 0 <= t - s < microbatches else -1 for s in range(stages)] for t in ticks]
