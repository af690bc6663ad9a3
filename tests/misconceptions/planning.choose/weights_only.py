"""only the weights are taken to need room"""

from labkit.predict.cost import predict


def choose(model, hardware, gpus, batch, context):
    kept = []
    degrees = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp, pp in ((tp, pp) for tp in degrees for pp in degrees if gpus % (tp * pp) == 0):
        dp = gpus // tp // pp
        told = predict(model, hardware, tp=tp, pp=pp, dp=dp, batch=batch, context=context)
        memory = told["memory"]
        if memory["weights_gb"] <= memory["usable_gb"]:
            kept.append((told["tpot_ms"], (tp, pp, dp)))
    return min(kept)[1]
