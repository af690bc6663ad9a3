"""overlap is taken to be perfect"""


def ticks(layers, compute, exchange):
    return 2 * layers * max(compute, exchange)
