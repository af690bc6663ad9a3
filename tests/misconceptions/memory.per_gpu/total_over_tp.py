"""every rank is given total / tp, KV heads included"""


def per_gpu(model, tp):
    attention = 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads)
    mlp = 3 * model.hidden * model.intermediate
    ends = (1 if model.tied else 2) * model.vocab * model.hidden
    total = (model.layers * (attention + mlp) + ends) * model.bytes_per_param
    return total / tp
