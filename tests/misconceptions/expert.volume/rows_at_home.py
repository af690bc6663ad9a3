"""rows that stay on their rank are counted: the payload, not the wire"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    owner = {expert: r for r, held in enumerate(placement) for expert in held}
    needs = [[{owner[expert] for expert in token} for token in tokens] for tokens in chosen]
    there = sum(len(ranks) for ranks in needs[rank])
    back = sum(rank in ranks for tokens in needs for ranks in tokens)
    return (there + back) * hidden * bytes_per_number
