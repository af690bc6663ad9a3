"""the cache goes on shrinking below one KV head per rank"""


def kv_capacity(model, tp, layers, free, length):
    kv_heads = model.kv_heads / tp
    tokens = -(-length // 16) * 16  # whole blocks
    per_layer = 2 * kv_heads * model.head_dim * model.bytes_per_param * tokens  # K and V
    return int(min(room // (n * per_layer) for n, room in zip(layers, free, strict=True)))
