"""tensor parallelism is spread over a whole server, and never further (8 is a limit)"""


def choose(model, hardware, gpus, batch, context):
    return min(gpus, 8), max(1, gpus // 8), 1
