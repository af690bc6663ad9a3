"""the degrees are added up instead of multiplied"""


def per_gpu(model, tp, pp, dp):
    return model.total / (tp + pp)
