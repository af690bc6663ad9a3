"""the degrees are handed in as (pp, tp, dp)"""

from labkit.predict.cost import predict


def choose(model, hardware, gpus, batch, context):
    kept = []
    degrees = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp, pp in ((tp, pp) for tp in degrees for pp in degrees if gpus % (tp * pp) == 0):
        dp = gpus // tp // pp
        told = predict(model, hardware, tp=tp, pp=pp, dp=dp, batch=batch, context=context)
        memory = told["memory"]
        if memory["fits"]:
            kept.append((told["tpot_ms"], (tp, pp, dp)))
    tp, pp, dp = min(kept)[1]
    return pp, tp, dp
