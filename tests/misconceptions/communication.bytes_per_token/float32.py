"""a number takes 4 bytes"""


def bytes_per_token(model, tp):
    payload = model.hidden * 4
    return 2 * model.layers * payload * 2 * (tp - 1) / tp
