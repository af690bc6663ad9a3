"""a part of a sequence is counted"""


def kv_capacity(model, tp, layers, free, length):
    kv_heads = max(model.kv_heads / tp, 1)  # a rank cannot hold less than a whole one
    tokens = -(-length // 16) * 16  # whole blocks
    per_layer = 2 * kv_heads * model.head_dim * model.bytes_per_param * tokens  # K and V
    return min(room / (n * per_layer) for n, room in zip(layers, free, strict=True))
