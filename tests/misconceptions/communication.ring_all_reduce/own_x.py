"""every rank returns its own x"""


def ring_all_reduce(x, comm):
    return x
