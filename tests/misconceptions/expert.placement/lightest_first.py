"""the lightest experts are placed first"""


def expert_placement(load, ranks):
    room = -(-len(load) // ranks)
    total, count, owner = [0] * ranks, [0] * ranks, [0] * len(load)
    for e in sorted(range(len(load)), key=lambda e: load[e]):
        rank = min((r for r in range(ranks) if count[r] < room), key=lambda r: total[r])
        owner[e], count[rank] = rank, count[rank] + 1
        total[rank] += load[e]
    return owner
