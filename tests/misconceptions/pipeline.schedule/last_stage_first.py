"""the last stage begins, and the first comes last"""


def schedule(stages, microbatches):
    table = [[-1] * stages for _ in range(microbatches + stages - 1)]
    for s in range(stages):
        for j in range(microbatches):
            table[stages - 1 - s + j][s] = j
    return table
