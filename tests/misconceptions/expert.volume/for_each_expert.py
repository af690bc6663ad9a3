"""a token is counted once for each of its experts that are elsewhere"""


def expert_volume(chosen, placement, rank, hidden, bytes_per_number):
    owner = {expert: r for r, held in enumerate(placement) for expert in held}
    there = sum(owner[expert] != rank for token in chosen[rank] for expert in token)
    back = sum(
        owner[expert] == rank for r, tokens in enumerate(chosen) if r != rank for token in tokens for expert in token
    )
    return (there + back) * hidden * bytes_per_number
