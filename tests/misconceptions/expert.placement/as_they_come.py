"""experts are placed in the order of their numbers, each where there is least load so far"""


def expert_placement(load, ranks):
    room = -(-len(load) // ranks)
    total, count, owner = [0] * ranks, [0] * ranks, [0] * len(load)
    for e in range(len(load)):
        rank = min((r for r in range(ranks) if count[r] < room), key=lambda r: total[r])
        owner[e], count[rank] = rank, count[rank] + 1
        total[rank] += load[e]
    return owner
