"""a number takes 4 bytes"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    owner = {expert: r for r, held in enumerate(placement) for expert in held}
    needs = [[{owner[expert] for expert in token} for token in tokens] for tokens in chosen]
    there = sum(len(ranks - {rank}) for ranks in needs[rank])
    back = sum(rank in ranks for r, tokens in enumerate(needs) if r != rank for ranks in tokens)
    return (there + back) * hidden * 4
