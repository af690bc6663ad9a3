"""the length is not rounded up to whole blocks"""


def kv_capacity(model, tp, layers, free, length):
    kv_heads = max(model.kv_heads / tp, 1)  # a rank cannot hold less than a whole one
    tokens = length
    per_layer = 2 * kv_heads * model.head_dim * model.bytes_per_param * tokens  # K and V
    return int(min(room // (n * per_layer) for n, room in zip(layers, free, strict=True)))
