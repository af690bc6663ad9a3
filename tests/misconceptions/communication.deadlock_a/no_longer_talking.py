"""the ranks no longer talk to each other"""


def total_tokens(tokens, comm):
    return tokens
