"""the sum is divided by the number of ranks"""


def total_loss(batches, comm):
    return comm.all_reduce(sum(batch.sum() for batch in batches)) / comm.world_size
