"""filling and draining are left out"""


def bubble(stages, requests, tokens):
    return max(0, 1 - requests / stages)
