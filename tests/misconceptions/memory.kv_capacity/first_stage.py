"""only the first stage is looked at"""


def kv_capacity(model, tp, layers, free, length):
    kv_heads = max(model.kv_heads / tp, 1)  # a rank cannot hold less than a whole one
    tokens = -(-length // 16) * 16  # whole blocks
    per_layer = 2 * kv_heads * model.head_dim * model.bytes_per_param * tokens  # K and V
    return free[0] // (layers[0] * per_layer)
