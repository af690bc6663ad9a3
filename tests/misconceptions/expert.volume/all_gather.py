"""every token goes to every rank"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    tokens = [len(mine) for mine in chosen]
    there = (len(placement) - 1) * tokens[rank]
    back = sum(tokens) - tokens[rank]
    return (there + back) * hidden * bytes_per_number
