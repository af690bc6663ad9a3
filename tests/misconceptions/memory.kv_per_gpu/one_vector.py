"""K and V are counted as one"""


def kv_per_gpu(model, tp, context, batch):
    kv_heads = max(model.kv_heads / tp, 1)
    numbers_per_token = model.layers * kv_heads * model.head_dim
    return numbers_per_token * model.bytes_per_param * context * batch
