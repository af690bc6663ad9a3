"""memory is read at the datasheet's bandwidth"""


def time_per_token(model, tp, pp, gpu):
    read = model.total / tp / (gpu.bandwidth_gbs * 1e6)
    exchanges = 2 * model.layers * gpu.all_reduce_us[tp] if tp > 1 else 0
    fixed = model.layers * gpu.layer_us
    hops = pp * gpu.hop_us if pp > 1 else 0
    return read + (exchanges + fixed + hops) / 1e3
