"""a parameter takes one byte, or the share is halved once more"""


def seventy_b(tp):
    return 70 / tp
