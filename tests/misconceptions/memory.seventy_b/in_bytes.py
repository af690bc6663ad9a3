"""the answer is in bytes"""


def seventy_b(tp):
    return 140e9 / tp
