"""only one half is counted"""


def ticks(layers, compute, exchange):
    return layers * max(compute, exchange) + min(compute, exchange)
