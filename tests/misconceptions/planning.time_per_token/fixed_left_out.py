"""each layer's fixed cost is left out"""


def time_per_token(model, tp, pp, gpu):
    read = model.total / tp / (gpu.bandwidth_gbs * gpu.efficiency * 1e6)
    exchanges = 2 * model.layers * gpu.all_reduce_us[tp] if tp > 1 else 0
    fixed = 0
    hops = pp * gpu.hop_us if pp > 1 else 0
    return read + (exchanges + fixed + hops) / 1e3
