"""the hidden state is divided by tp"""


def bytes_per_token(model, tp):
    payload = model.hidden / tp * model.bytes_per_param
    return 2 * model.layers * payload * 2 * (tp - 1) / tp
