"""a parameter takes 4 bytes"""


def seventy_b(tp):
    return 70 * 4 / tp
