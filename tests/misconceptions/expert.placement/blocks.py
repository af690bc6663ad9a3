"""experts are sorted by load, then cut into blocks"""

from labkit import split


def expert_placement(load, ranks):
    order = sorted(range(len(load)), key=lambda e: -load[e])
    owner = [0] * len(load)
    for i, e in enumerate(order):
        owner[e] = next(r for r, mine in enumerate(split.experts(len(load), ranks)) if i in mine)
    return owner
