"""a micro-batch must leave the last stage before the next one enters the first"""


def schedule(stages, microbatches):
    table = [[-1] * stages for _ in range(stages * microbatches)]
    for s in range(stages):
        for j in range(microbatches):
            table[stages * j + s][s] = j
    return table
