"""only tensor parallelism divides the weights: the stages are forgotten"""


def per_gpu(model, tp, pp, dp):
    return model.total / tp
