"""Two half-batches: solutions pass on real ranks, and mistakes made there are told by name."""

import nbformat
import pytest
from test_notebooks import ROOT

from labkit.lab.check import check
from labkit.lab.exercises import EXERCISES
from labkit.lab.exercises.overlap import TICKS

SEED = 4


def solution(name):
    scope = {}
    for cell in nbformat.read(ROOT / "solutions" / "overlap_two_halves.ipynb", as_version=4).cells:
        if "answer" in cell.metadata.get("tags", []):
            exec(cell.source, scope)
    return scope[name]


def told(name, fn, part):
    found = {m.name for m in EXERCISES[name].misconceptions if part in m.name}
    assert len(found) == 1, found
    result = check(name, fn, seed=SEED)
    assert (result.status, result.points) == ("not yet", 0), result
    return f"That is what you get when {found.pop()}. " in result.message


@pytest.mark.parametrize("name", ["two_halves", "ticks"])
def test_the_solution_passes(name):
    for seed in (SEED, 7):
        assert check(f"overlap.{name}", solution(name), seed=seed).status == "passed"


def driver(*, wait="turn", products="first", swap=False, last=0):
    """Both halves through all layers; wait: for a sum at its half's "turn", at the layer's "end", or at "once"."""

    def fn(layers, halves, comm):
        xs, pending = list(halves), [None, None]
        for layer in range(len(layers) - last):
            partials = [layers.product(layer, x, comm) for x in xs] if products == "both" else [None, None]
            for i in (0, 1):
                if pending[i]:
                    xs[i], pending[i] = pending[i].wait(), None
                partial = partials[i] if products == "both" else layers.product(layer, xs[i], comm)
                pending[i] = layers.start(partial, comm)
                if wait == "once":
                    xs[i], pending[i] = pending[i].wait(), None
            if wait == "end":
                xs, pending = [p.wait() for p in pending], [None, None]
        xs = [p.wait() if p else x for p, x in zip(pending, xs, strict=True)]
        return layers.done(xs[::-1] if swap else xs)

    return fn


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"wait": "once"}, "waited for where it is started"),
        ({"wait": "end", "products": "both"}, "after both products"),
        ({"wait": "end"}, "at the end of each layer"),
        ({"swap": True}, "other order"),
        ({"last": 1}, "left out"),
    ],
)
def test_a_wrong_driver_is_told_by_name(options, part):
    assert told("overlap.two_halves", driver(**options), part)


def test_ranks_that_start_with_different_halves_do_not_pass():
    right = driver()

    def crossed(layers, halves, comm):
        return right(layers, halves if comm.rank == 0 else halves[::-1], comm)

    assert check("overlap.two_halves", crossed, seed=SEED).status in ("not yet", "hung")


@pytest.mark.parametrize(
    ("fn", "part"),
    [
        (lambda n, c, a: 2 * n * (c + a), "nothing is hidden"),
        (lambda n, c, a: 2 * n * max(c, a), "perfect"),
        (lambda n, c, a: 2 * n * c + a, "exchanges are taken"),
        (lambda n, c, a: c + 2 * n * a, "products are taken"),
        (lambda n, c, a: n * max(c, a) + min(c, a), "one half"),
        (lambda n, c, a: n * (max(c, a) + c + a), "both ends"),
    ],
)
def test_wrong_ticks_are_told_by_name(fn, part):
    assert told("overlap.ticks", fn, part)


@pytest.mark.parametrize(("n", "c", "a", "ticks"), [(1, 3, 2, 8), (2, 2, 2, 10), (2, 1, 3, 13)])
def test_the_clock_counts_as_by_hand(n, c, a, ticks):
    assert TICKS.reference(n, c, a) == ticks
