"""results are counted once for each expert"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    owner = {expert: r for r, held in enumerate(placement) for expert in held}
    needs = [[{owner[expert] for expert in token} for token in tokens] for tokens in chosen]
    there = sum(len(ranks - {rank}) for ranks in needs[rank])
    back = sum(
        owner[expert] == rank for r, tokens in enumerate(chosen) if r != rank for token in tokens for expert in token
    )
    return (there + back) * hidden * bytes_per_number
