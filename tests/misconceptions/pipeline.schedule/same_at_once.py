"""all stages work on the same micro-batch at the same time"""


def schedule(stages, microbatches):
    return [[j] * stages for j in range(microbatches)]
