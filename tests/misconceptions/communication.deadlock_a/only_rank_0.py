"""only rank 0 has the total"""


def total_tokens(tokens, comm):
    total = comm.all_reduce(tokens.clone())
    return total if comm.rank == 0 else tokens
