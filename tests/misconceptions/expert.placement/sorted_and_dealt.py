"""experts are sorted by load, then dealt out one by one"""


def expert_placement(load, ranks):
    order = sorted(range(len(load)), key=lambda e: -load[e])
    owner = [0] * len(load)
    for i, e in enumerate(order):
        owner[e] = i % ranks
    return owner
