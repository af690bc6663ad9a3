"""all tokens of all requests are taken to be independent micro-batches"""


def bubble(stages, requests, tokens):
    return (stages - 1) / (requests * tokens + stages - 1)
