"""it is the busy part, not the idle one"""


def bubble(stages, requests, tokens):
    lanes = min(requests, stages)
    ticks = (tokens - 1) * stages + lanes + stages - 1
    return tokens * lanes / ticks
