"""more requests than stages are given a turn each"""


def bubble(stages, requests, tokens):
    ticks = (tokens - 1) * max(stages, requests) + requests + stages - 1
    return 1 - tokens * requests / ticks
