"""the answer is in GiB"""


def seventy_b(tp):
    return 140e9 / 2**30 / tp
