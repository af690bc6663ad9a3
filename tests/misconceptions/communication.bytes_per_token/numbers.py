"""numbers are counted, not bytes"""


def bytes_per_token(model, tp):
    payload = model.hidden
    return 2 * model.layers * payload * 2 * (tp - 1) / tp
