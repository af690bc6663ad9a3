"""one all-to-all is counted, the dispatch"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    owner = {expert: r for r, held in enumerate(placement) for expert in held}
    needs = [[{owner[expert] for expert in token} for token in tokens] for tokens in chosen]
    there = sum(len(ranks - {rank}) for ranks in needs[rank])
    return there * hidden * bytes_per_number
