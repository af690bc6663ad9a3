"""nothing is divided"""


def per_gpu(model, tp, pp, dp):
    return model.total
