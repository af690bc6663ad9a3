"""only one layer is counted"""


def kv_per_gpu(model, tp, context, batch):
    kv_heads = max(model.kv_heads / tp, 1)
    numbers_per_token = 2 * kv_heads * model.head_dim  # K and V
    return numbers_per_token * model.bytes_per_param * context * batch
