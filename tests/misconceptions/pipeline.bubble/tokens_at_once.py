"""one request's tokens are taken to follow each other through the stages at once"""


def bubble(stages, requests, tokens):
    return (stages - 1) / (tokens + stages - 1)
