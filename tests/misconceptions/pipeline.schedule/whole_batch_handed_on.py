"""a stage begins when the stage before it has done all micro-batches"""


def schedule(stages, microbatches):
    table = [[-1] * stages for _ in range(stages * microbatches)]
    for s in range(stages):
        for j in range(microbatches):
            table[microbatches * s + j][s] = j
    return table
