"""The loop that every rank runs: the same schedule everywhere, this rank's part of the model, ids back to all.

It knows token ids and requests, not text. `Engine` is one rank's; ranks meet only in `Comm`.
"""

import os
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from labkit.comm import Comm, Pending
from labkit.engine.requests import Request, Token
from labkit.engine.sampling import sample
from labkit.engine.scheduler import Scheduler, Step
from labkit.model.checkpoint import fill
from labkit.model.decoder import Decoder
from labkit.model.find import Model
from labkit.parallel import overlap, pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineOptions:
    """What all ranks must agree on before they load: numbers of sequences and tokens, dtype name, seed of random weights.

    overlap: how a step is cut so that its communication is hidden (`parallel.overlap`). trace: keep each operation's times.
    debug: compare each step's plan over the ranks of a replica, and name the one that differs.
    """

    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    seed: int
    overlap: str = "none"
    trace: bool = False
    debug: bool = False


@dataclass
class Counts:
    """What one `generate` did on one rank."""

    prompt_tokens: int = 0
    prefill_steps: int = 0
    decode_tokens: int = 0  # tokens sampled in decode steps
    decode_steps: int = 0
    ticks: int = 0  # turns of the lanes from the first step to the last, with or without work
    seconds: float = 0.0


class Engine:
    """One rank's part of the model, loaded, with its KV cache."""

    def __init__(self, model: Model, comm: Comm, options: EngineOptions) -> None:
        self.comm, self.options = comm, options
        self.lanes = comm.mesh.layout.pp
        self.slots = -(-options.max_num_seqs // self.lanes)
        self.counts = Counts()
        comm.events = [] if options.trace else None
        weights = model.weights(options.seed)
        with torch.inference_mode():
            self.decoder = Decoder(model.config, comm, DTYPES[options.dtype])
            fill(self.decoder.parameters(), weights)
            self.cache = self.decoder.cache(self.lanes * self.slots, options.max_model_len)
        self.bytes_read = weights.bytes_read

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> Iterator[list[Token]]:
        """Serves this replica's `requests`; yields the tokens of each step as they become known, alike on all its ranks."""
        self.comm.reset()
        counts = self.counts = Counts()
        began = time.perf_counter()
        scheduler = Scheduler(requests, self.lanes, self.slots, self.options.max_num_batched_tokens)
        flying: dict[int, tuple[Step, Pending]] = {}
        tick = 0
        while flying or not scheduler.done:
            lane = tick % self.lanes
            if lane in flying:
                step, pending = flying.pop(lane)
                ids = pending.wait().tolist()
                scheduler.commit(lane, step, ids)
                now = time.perf_counter() - began
                yield [Token(r.index, i, now, r.finish_reason) for r, i in zip(step.requests, ids, strict=True)]
            step_or_none = scheduler.next_step(lane)
            if self.options.debug:
                self._agree(tick, step_or_none)
            if step_or_none:
                flying[lane] = (step_or_none, self._forward(step_or_none))
                counts.ticks = tick + 1
                self._count(step_or_none)
            tick += 1
        self.comm.flush()
        counts.seconds = time.perf_counter() - began

    def _forward(self, step: Step) -> Pending:
        """This stage's part of `step`; the ids that the last stage samples are on their way to all stages."""
        self.comm.phase = "prefill" if step.prefill else "decode"
        ids = torch.tensor([i for tokens in step.tokens for i in tokens], device=self.comm.device)
        x = pipeline.receive(self.comm, ids, self.decoder)
        parts = overlap.cut(step.tokens, step.starts, step.slots, self.options.overlap)
        y = overlap.forward(self.comm, self.decoder, self.cache, x, parts)
        chosen = sample(y, step, self.decoder.head) if self.decoder.last else None
        return pipeline.pass_on(self.comm, y, chosen, len(step.requests))

    def _agree(self, tick: int, step: Step | None) -> None:
        """Raises if the ranks of this replica have not planned the same step, before they wait for each other in vain."""
        digest = zlib.crc32(repr(step and (step.prefill, step.slots, step.tokens, step.starts)).encode())
        for axis in ("tp", "pp"):
            digests = (
                self.comm.all_gather(torch.tensor([digest], device=self.comm.device), axis, "plan").flatten().tolist()
            )
            usual = max(digests, key=digests.count)
            odd = [peer for peer, seen in zip(self.comm.mesh.peers(axis), digests, strict=True) if seen != usual]
            if odd:
                raise RuntimeError(
                    f"tick {tick}: rank(s) {odd} planned another step than the rest of {self.comm.mesh.peers(axis)}"
                )

    def _count(self, step: Step) -> None:
        if step.prefill:
            self.counts.prefill_steps += 1
            self.counts.prompt_tokens += sum(len(t) for t in step.tokens)
        else:
            self.counts.decode_steps += 1
            self.counts.decode_tokens += len(step.requests)

    def report(self) -> dict[str, Any]:
        """What this rank holds, and what the last `generate` did and sent."""
        place = self.comm.mesh.layout.place(self.comm.rank)
        counts = self.counts
        tokens = {"prefill": counts.prompt_tokens, "decode": counts.decode_tokens}
        steps = counts.prefill_steps + counts.decode_steps
        # Every step spends one tick on each stage; a lane's turn reaches the last stage pp - 1 ticks after the first.
        span = counts.ticks + self.comm.mesh.layout.pp - 1
        return {
            "rank": self.comm.rank,
            "pid": os.getpid(),
            "stage": place["pp"],
            "place": place,
            "layers": len(self.decoder.layers),
            "weights_bytes": self.decoder.weights_bytes,
            "bytes_read": self.bytes_read,
            "kv_bytes": self.cache.bytes,
            "peak_rss_bytes": _peak_rss(),
            "bubble_fraction": 1 - steps / span if steps else 0.0,
            "prompt_tokens": counts.prompt_tokens,
            "decode_tokens": counts.decode_tokens,
            "decode_steps": counts.decode_steps,
            "seconds": counts.seconds,
            "shared_memory": sorted(self.comm.shared),
            "events": self.comm.events,
            "comm": [
                {
                    "op": op,
                    "axis": axis,
                    "phase": phase,
                    "what": what,
                    "calls": tally.calls,
                    "payload_bytes": tally.payload_bytes,
                    "wire_bytes": tally.wire_bytes,
                    "seconds": tally.seconds,
                    "hidden_seconds": tally.hidden_seconds,
                    "tokens": tokens.get(phase, 0),
                }
                for (op, axis, phase, what), tally in self.comm.tallies.items()
            ],
        }


def _peak_rss() -> int:
    """Most memory this process has held, in bytes (shared pages of libraries included)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
