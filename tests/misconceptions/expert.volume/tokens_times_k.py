"""it is tokens x top_k"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    rows = sum(len(token) for token in chosen[rank])
    return rows * hidden * bytes_per_number
