"""every stage is given the cache of all layers"""


def kv_capacity(model, tp, layers, free, length):
    kv_heads = max(model.kv_heads / tp, 1)  # a rank cannot hold less than a whole one
    tokens = -(-length // 16) * 16  # whole blocks
    per_layer = 2 * kv_heads * model.head_dim * model.bytes_per_param * tokens  # K and V
    return int(min(room // (sum(layers) * per_layer) for room in free))
