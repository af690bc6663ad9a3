"""the answer is in GB"""


def per_gpu(model, tp, pp, dp):
    return model.total / (tp * pp) / 1e9
