"""the embedding and the output head are left out"""


def per_gpu(model, tp):
    kv_heads = max(model.kv_heads / tp, 1)  # a rank cannot hold less than a whole one
    attention = 2 * model.hidden * model.head_dim * (model.heads / tp + kv_heads)  # q and o; k and v
    mlp = 3 * model.hidden * model.intermediate / tp
    return (model.layers * (attention + mlp)) * model.bytes_per_param
