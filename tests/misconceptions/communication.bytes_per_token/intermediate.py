"""the MLP's all-reduce is taken to be as wide as its intermediate activation"""


def bytes_per_token(model, tp):
    payload = model.hidden * model.bytes_per_param  # one hidden vector
    wide = model.intermediate * model.bytes_per_param
    return model.layers * (payload + wide) * 2 * (tp - 1) / tp
