"""experts are dealt out one by one in the order of their numbers"""


def expert_placement(load, ranks):
    return [e % ranks for e in range(len(load))]
