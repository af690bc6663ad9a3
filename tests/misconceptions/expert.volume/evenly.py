"""experts are taken to be chosen evenly, so that (n - 1) / n of all choices are elsewhere"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    rows = sum(len(token) for token in chosen[rank])
    n = len(placement)
    return 2 * rows * (n - 1) / n * hidden * bytes_per_number
