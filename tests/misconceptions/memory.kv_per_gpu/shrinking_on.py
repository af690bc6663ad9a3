"""the cache goes on shrinking below one KV head per rank"""


def kv_per_gpu(model, tp, context, batch):
    kv_heads = model.kv_heads / tp
    numbers_per_token = 2 * model.layers * kv_heads * model.head_dim  # K and V
    return numbers_per_token * model.bytes_per_param * context * batch
