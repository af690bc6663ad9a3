"""neighbours go together, whatever their load"""


def expert_placement(load, ranks):
    counts = [len(load) // ranks + (rank < len(load) % ranks) for rank in range(ranks)]
    return [rank for rank, count in enumerate(counts) for _ in range(count)]
