"""one all-reduce is counted in each layer, or the ring is gone round only once"""


def bytes_per_token(model, tp):
    payload = model.hidden * model.bytes_per_param  # one hidden vector
    return model.layers * payload * 2 * (tp - 1) / tp
