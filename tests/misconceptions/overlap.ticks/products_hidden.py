"""all products are taken to be hidden"""


def ticks(layers, compute, exchange):
    return 2 * layers * exchange + compute
