"""an all-reduce is taken to last bytes / bandwidth, or all of them are left out"""


def time_per_token(model, tp, pp, gpu):
    read = model.total / tp / (gpu.bandwidth_gbs * gpu.efficiency * 1e6)
    exchanges = 2 * model.layers * 2 * (tp - 1) / tp * model.hidden * 2 / (gpu.link_gbs * 1e3) if tp > 1 else 0
    fixed = model.layers * gpu.layer_us
    hops = pp * gpu.hop_us if pp > 1 else 0
    return read + (exchanges + fixed + hops) / 1e3
