"""requests are taken for the micro-batches of one pass"""


def bubble(stages, requests, tokens):
    return (stages - 1) / (requests + stages - 1)
