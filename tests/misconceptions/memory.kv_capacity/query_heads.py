"""query heads are counted instead of KV heads"""


def kv_capacity(model, tp, layers, free, length):
    kv_heads = model.heads / tp
    tokens = -(-length // 16) * 16  # whole blocks
    per_layer = 2 * kv_heads * model.head_dim * model.bytes_per_param * tokens  # K and V
    return int(min(room // (n * per_layer) for n, room in zip(layers, free, strict=True)))
