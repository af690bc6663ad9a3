"""CUDA graphs of decode steps: what a GPU does for one token of each sequence, recorded once for a shape, launched as one.

A layer of a decode step is a dozen kernels, each of which runs for less time than Python takes to launch it; a recorded step
has no Python in it (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). A recording repeats the same kernels
on the same memory, so a step's numbers are copied into memory of its own, and the sequences and their blocks are filled up to
a power of two: the last sequence again, which writes to the cache what it had written.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from labkit.comm import Comm
from labkit.model.attention import Batch, KVCache, filled, slot
from labkit.model.decoder import Decoder
from labkit.parallel import overlap

LEAST = 16  # blocks of a sequence that a recording has room for
Compute = Callable[[], torch.Tensor]


class DecodeGraphs:
    """One stage's decode steps, by shape: computed as they come the first time, recorded the second, repeated thereafter.

    record: what makes a repeatable computation of one; a CUDA graph, unless a test has no GPU.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, comm: Comm, record: Callable[[Compute], Compute] | None = None
    ) -> None:
        self.decoder, self.cache, self.comm = decoder, cache, comm
        self._record = record or _Recorder()
        self.steps: dict[tuple[int, int], _Step] = {}

    def takes(self, parts: Sequence[overlap.Part]) -> bool:
        """Whether a step is one whole with one token of each sequence, each of which wants logits."""
        return (
            len(parts) == 1 and bool(parts[0].ends) and all(parts[0].ends) and all(len(p) == 1 for p in parts[0].pieces)
        )

    def forward(self, x: torch.Tensor, part: overlap.Part) -> torch.Tensor:
        """`overlap.forward` of a step that it `takes`."""
        rows = len(part.starts)
        blocks = max(start // self.cache.size + 1 for start in part.starts)
        shape = _power_of_two(rows), max(LEAST, _power_of_two(blocks))
        if shape not in self.steps:
            self.steps[shape] = _Step(*shape, x, self)
            return self.steps[shape].run(x, part)
        step = self.steps[shape]
        if step.counted is None:
            with self.comm.apart() as step.counted:
                step.compute = self._record(step.compute)
        step.repeats += 1
        return step.run(x, part)

    def settle(self) -> None:
        """Adds what the repetitions since the last time have sent to what `comm` has counted."""
        for step in self.steps.values():
            if step.repeats:
                self.comm.repeated(step.counted or {}, step.repeats)
            step.repeats = 0


class _Step:
    """The memory of one shape, and what is computed on it. A recording keeps addresses only: what it reads is kept here."""

    def __init__(self, rows: int, blocks: int, x: torch.Tensor, graphs: DecodeGraphs) -> None:
        self.rows, self.blocks, self.size = rows, blocks, graphs.cache.size
        self.x = x.new_zeros(rows, *x.shape[1:])
        self.numbers = torch.zeros(rows * (2 + blocks), dtype=torch.int64, device=x.device)  # one copy brings them all
        self.last = torch.arange(rows, device=x.device)
        positions, slots, tables = self.numbers.split([rows, rows, rows * blocks])
        self.counted: dict[Any, Any] | None = None
        self.repeats = 0

        def compute() -> torch.Tensor:
            batch = Batch(
                positions=positions, slots=slots, last=self.last, singles=rows, tables=tables.view(rows, blocks),
                context=blocks * self.size, pieces=[], replicas=[rows], size=self.size,
            )  # fmt: skip
            return overlap.alone(graphs.comm, graphs.decoder(self.x, batch, graphs.cache))

        self.compute: Compute = compute

    def run(self, x: torch.Tensor, part: overlap.Part) -> torch.Tensor:
        spare = self.rows - len(x)
        starts, tables = part.starts + part.starts[-1:] * spare, part.tables + part.tables[-1:] * spare
        slots = [slot(table, at, self.size) for table, at in zip(tables, starts, strict=True)]
        numbers = torch.tensor([*starts, *slots, *(block for table in tables for block in filled(table, self.blocks))])
        if torch.cuda.is_available():
            numbers = numbers.pin_memory()  # so that the host doesn't wait for the copy
        self.numbers.copy_(numbers, non_blocking=True)
        self.x[: len(x)] = x
        self.x[len(x) :] = x[-1:]
        return self.compute()[: len(x)].clone()  # the next repetition writes over it


class _Recorder:
    """Records CUDA graphs, which share the memory between their kernels: one runs after the other."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # NCCL's own thread goes on
            y = compute()

        def repeat() -> torch.Tensor:
            graph.replay()
            return y

        return repeat


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
