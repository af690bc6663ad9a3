"""the number of experts that a rank can hold is ignored"""


def expert_placement(load, ranks):
    order = sorted(range(len(load)), key=lambda e: -load[e])
    owner = [0] * len(load)
    total = [0] * ranks
    for e in order:
        owner[e] = rank = total.index(min(total))
        total[rank] += load[e]
    return owner
