"""the layout for the highest throughput is chosen"""

from labkit.predict.plan import plan


def choose(model, hardware, gpus, batch, context):
    found = plan(model, hardware, gpus=gpus, batch=batch, context=context, objective="throughput")
    layout = found["recommended"]["layout"]
    return layout["tp"], layout["pp"], layout["dp"]
