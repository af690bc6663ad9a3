"""idle time is divided by busy time"""


def bubble(stages, requests, tokens):
    lanes = min(requests, stages)
    ticks = (tokens - 1) * stages + lanes + stages - 1
    busy = tokens * lanes
    return (ticks - busy) / busy
