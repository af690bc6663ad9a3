"""neighbours go together, whatever their load"""


def expert_placement(load, ranks):
    return [e // -(-len(load) // ranks) for e in range(len(load))]
