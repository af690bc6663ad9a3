"""all stages are taken to be as fast as their mean"""


def finish(times, microbatches):
    return (microbatches + len(times) - 1) * sum(times) / len(times)
