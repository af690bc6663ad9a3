"""the ranks no longer talk to each other"""


def total_loss(batches, comm):
    return sum(batch.sum() for batch in batches)
