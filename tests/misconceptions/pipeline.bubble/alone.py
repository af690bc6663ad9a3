"""one request is taken to be alone"""


def bubble(stages, requests, tokens):
    return (stages - 1) / stages
