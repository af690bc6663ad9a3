"""Two half-batches, on real ranks. Mistakes are in misconceptions/."""

import pytest

from labkit.lab.check import check
from labkit.lab.exercises.overlap import TICKS

SEED = 4


def right(layers, halves, comm):
    """Each half waits for its sum at its own turn, while the other's is under way."""
    xs, pending = list(halves), [None, None]
    for layer in range(len(layers)):
        for i in (0, 1):
            if pending[i]:
                xs[i] = pending[i].wait()
            pending[i] = layers.start(layers.product(layer, xs[i], comm), comm)
    return layers.done([p.wait() for p in pending])


def test_ranks_that_start_with_different_halves_do_not_pass():
    def crossed(layers, halves, comm):
        return right(layers, halves if comm.rank == 0 else halves[::-1], comm)

    assert check("overlap.two_halves", right, seed=SEED).status == "passed"
    assert check("overlap.two_halves", crossed, seed=SEED).status in ("not yet", "hung")


@pytest.mark.parametrize(("n", "c", "a", "ticks"), [(1, 3, 2, 8), (2, 2, 2, 10), (2, 1, 3, 13)])
def test_the_clock_counts_as_by_hand(n, c, a, ticks):
    assert TICKS.reference(n, c, a) == ticks
