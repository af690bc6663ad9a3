"""both halves are waited for at the end of each layer"""


def two_halves(layers, halves, comm):
    xs = list(halves)
    for layer in range(len(layers)):
        pending = [layers.start(layers.product(layer, x, comm), comm) for x in xs]
        xs = [p.wait() for p in pending]
    return layers.done(xs)
