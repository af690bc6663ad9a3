"""nothing is hidden"""


def ticks(layers, compute, exchange):
    return 2 * layers * (compute + exchange)
