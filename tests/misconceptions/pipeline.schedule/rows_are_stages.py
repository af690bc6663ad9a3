"""rows are stages and columns are ticks"""


def schedule(stages, microbatches):
    ticks = range(microbatches + stages - 1)
    return [[t - s if 0 <= t - s < microbatches else -1 for t in ticks] for s in range(stages)]
