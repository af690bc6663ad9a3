"""the memory of all ranks is one pot"""


def kv_capacity(model, tp, layers, free, length):
    kv_heads = model.kv_heads
    tokens = -(-length // 16) * 16  # whole blocks
    per_layer = 2 * kv_heads * model.head_dim * model.bytes_per_param * tokens  # K and V
    return tp * sum(free) // (sum(layers) * per_layer)
