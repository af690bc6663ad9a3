"""the embedding's all-reduce is counted too"""


def bytes_per_token(model, tp):
    payload = model.hidden * model.bytes_per_param  # one hidden vector
    return (2 * model.layers + 1) * payload * 2 * (tp - 1) / tp
