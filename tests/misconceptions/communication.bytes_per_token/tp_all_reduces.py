"""tp all-reduces are counted in each layer, or a rank sends its tensor whole to each of the others"""


def bytes_per_token(model, tp):
    payload = model.hidden * model.bytes_per_param  # one hidden vector
    return tp * model.layers * payload * 2 * (tp - 1) / tp
