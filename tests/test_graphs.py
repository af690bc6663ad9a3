"""Decode steps as CUDA graphs would repeat them, on CPU ranks: the same memory each time, shapes filled up.

A "recording" here computes again what would have been recorded. Whatever a step doesn't hand over through that memory would be
missing or old in the second step. What this can't show is the recording itself: `tests/test_gpu.py` does.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import write
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit import run
from labkit.comm import Comm
from labkit.engine import graphs
from labkit.engine.core import Engine, EngineOptions
from labkit.engine.graphs import DecodeGraphs
from labkit.engine.requests import Request, SamplingParams
from labkit.mesh import Layout
from labkit.model.decoder import Decoder
from labkit.model.find import find
from labkit.parallel import overlap

PROMPTS = [3, 30, 60, 9, 17]  # tokens: 60 and their output need more blocks than the smallest recording has


def serve(comm: Comm, folder: Path, kinds: list[str]) -> list[tuple[dict[int, list[int]], dict, dict]]:
    """What an engine says and sends, by kind: tokens by request, counts of its decode steps, shapes and whether recorded."""
    graphs.LEAST = 2
    engine = Engine(find(str(folder)), comm, EngineOptions("float32", 96, 8, 512, seed=0))
    found = []
    for kind in kinds:
        engine.graphs = DecodeGraphs(engine.decoder, engine.cache, comm, RECORDS[kind]) if kind != "none" else None
        params = SamplingParams(temperature=0.8, max_tokens=99, ignore_eos=True)
        requests = [
            Request(i, [(7 * j + i) % 60 + 3 for j in range(n)], params, i, frozenset(), max_tokens=4 + 4 * i)
            for i, n in enumerate(PROMPTS)
        ]
        tokens: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
        for progress in engine.generate(requests):
            for token in progress.tokens:
                tokens[token.request].append(token.id)
        counts = {key: (tally.calls, tally.payload_bytes) for key, tally in comm.tallies.items() if "decode" in key}
        found.append(
            (
                tokens,
                counts,
                {shape: step.counted is not None for shape, step in engine.graphs.steps.items()}
                if engine.graphs
                else {},
            )
        )
    return found


def stale(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A recording that would not see what is handed over."""
    y = compute()
    return lambda: y


RECORDS = {"again": lambda compute: compute, "stale": stale}


@pytest.mark.parametrize(
    ("layout", "kernels"),
    [(Layout(), "torch"), (Layout(tp=2), "c"), (Layout(pp=2), "torch")],
    ids=["alone", "tp2", "pp2"],
)
def test_repeated_steps_say_and_send_the_same(
    layout: Layout, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_KERNELS", kernels)
    write("qwen3", tmp_path)
    for (tokens, counts, _), (again, repeated, shapes), (stale, _, _) in run(
        serve, layout=layout, args=(tmp_path, ["none", "again", "stale"]), timeout=60
    ):
        assert again == tokens != stale
        assert {rows for (rows, _), recorded in shapes.items() if recorded} >= {1, 2, 4} | {8 // layout.pp}
        assert counts.keys() == repeated.keys()
        for key, (calls, payload) in counts.items():
            assert repeated[key][0] == calls and payload <= repeated[key][1] <= 2 * payload


class Reads(TorchDispatchMode):
    """Notes what operations read that they have not made themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.read: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        read = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.read |= {s._cdata: StorageWeakRef(s) for s in read if s._cdata not in self.made}
        out = func(*args, **(kwargs or {}))
        made = {t.untyped_storage()._cdata for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        self.made |= made - self.read.keys()
        return out


def lost(comm: Comm, folder: Path) -> tuple[int, int]:
    """How much a recorded step has read, and how much of that isn't there any more."""
    reads = Reads()

    def addresses_only(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """All that a CUDA graph keeps of `compute`."""
        with reads:
            y = compute()
        return lambda: y

    with torch.inference_mode():
        decoder = Decoder(find(str(folder)).config, comm, torch.float32)
        recorded = DecodeGraphs(decoder, decoder.cache(blocks=3, size=16), comm, addresses_only)
        for _ in range(2):
            parts = overlap.cut([[1], [2]], [5, 9], [[2], [0]], [True, True])
            recorded.forward(torch.tensor([1, 2], device=comm.device), *parts)
    return len(reads.read), sum(storage.expired() for storage in reads.read.values())


def test_what_a_recording_reads_outlives_it(tmp_path: Path) -> None:
    write("qwen3", tmp_path)
    ((read, gone),) = run(lost, 1, args=(tmp_path,), timeout=60)
    assert read > 0 and gone == 0
