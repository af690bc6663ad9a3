"""the weights are not divided by tp"""


def seventy_b(tp):
    return 140
