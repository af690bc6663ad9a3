"""both ends are counted as exposed, in every layer"""


def ticks(layers, compute, exchange):
    return layers * (max(compute, exchange) + compute + exchange)
