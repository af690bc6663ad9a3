"""the weights are not divided by tp"""


def per_gpu(model, tp):
    tp = 1
    kv_heads = max(model.kv_heads / tp, 1)  # a rank cannot hold less than a whole one
    attention = 2 * model.hidden * model.head_dim * (model.heads / tp + kv_heads)  # q and o; k and v
    mlp = 3 * model.hidden * model.intermediate / tp
    ends = (1 if model.tied else 2) * model.vocab * model.hidden / tp
    return (model.layers * (attention + mlp) + ends) * model.bytes_per_param
