"""one micro-batch is followed, and the others are forgotten"""


def finish(times, microbatches):
    return sum(times)
