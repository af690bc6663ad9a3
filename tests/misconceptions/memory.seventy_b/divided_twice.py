"""they are divided by tp twice, in width and in layers"""


def seventy_b(tp):
    return 140 / tp / tp
