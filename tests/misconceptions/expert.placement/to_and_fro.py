"""experts are sorted by load, then dealt out to and fro"""


def expert_placement(load, ranks):
    order = sorted(range(len(load)), key=lambda e: -load[e])
    owner = [0] * len(load)
    for i, e in enumerate(order):
        lap, at = divmod(i, ranks)
        owner[e] = ranks - 1 - at if lap % 2 else at
    return owner
