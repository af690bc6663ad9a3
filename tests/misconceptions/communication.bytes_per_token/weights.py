"""weights are counted"""


def bytes_per_token(model, tp):
    attention = 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads)
    mlp = 3 * model.hidden * model.intermediate
    ends = 2 * model.vocab * model.hidden
    return (model.layers * (attention + mlp) + ends) * model.bytes_per_param / tp
