"""all ranks are counted together"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    owner = {expert: r for r, held in enumerate(placement) for expert in held}
    crossing = sum(
        len({owner[expert] for expert in token} - {r}) for r, tokens in enumerate(chosen) for token in tokens
    )
    return 2 * crossing * hidden * bytes_per_number
