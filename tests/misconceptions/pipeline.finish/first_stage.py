"""the first stage sets the pace"""


def finish(times, microbatches):
    return sum(times) + (microbatches - 1) * times[0]
