"""only the slowest stage is counted, once for each micro-batch"""


def finish(times, microbatches):
    return microbatches * max(times)
