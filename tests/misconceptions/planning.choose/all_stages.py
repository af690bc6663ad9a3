"""stages are taken to divide the time of a token"""


def choose(model, hardware, gpus, batch, context):
    return 1, gpus, 1
