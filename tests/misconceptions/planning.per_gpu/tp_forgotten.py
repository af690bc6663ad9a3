"""only the stages divide the weights: tp is forgotten"""


def per_gpu(model, tp, pp, dp):
    return model.total / pp
