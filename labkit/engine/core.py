"""The loop that every rank runs: the same schedule everywhere, this rank's part of the model, ids back to all.

It knows token ids and requests, not text. `Engine` is one rank's; ranks meet only in `Comm`.
"""

import os
import resource
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from labkit.comm import Comm, Pending
from labkit.engine.requests import Request, Token
from labkit.engine.sampling import sample
from labkit.engine.scheduler import Scheduler, Step
from labkit.model.checkpoint import fill
from labkit.model.decoder import Decoder
from labkit.model.find import Model
from labkit.parallel import overlap, pipeline
from labkit.parallel.expert import Spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineOptions:
    """What all ranks must agree on before they load: numbers of sequences and tokens, dtype name, seed of random weights.

    overlap: how a step is cut so that its communication is hidden (`parallel.overlap`). spread: which rank has which experts,
    and how tokens reach them (`parallel.expert`). trace: keep each operation's times. debug: compare each step's plan over the
    ranks that take it together, and name the one that differs.
    """

    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    seed: int
    overlap: str = "none"
    spread: Spread = field(default_factory=Spread)
    trace: bool = False
    debug: bool = False


Plan = dict[int, Step]  # what each replica does in a step, of those that a rank follows


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
        # Replicas that share experts take each step together, each following all plans; others go their own ways.
        layout, self.replica = comm.mesh.layout, comm.mesh.dp_rank
        self.together = layout.dp > 1 and layout.ep > 1
        self.followed = range(layout.dp) if self.together else range(self.replica, self.replica + 1)
        self.counts = Counts()
        comm.events = [] if options.trace else None
        weights = model.weights(options.seed)
        with torch.inference_mode():
            self.decoder = Decoder(model.config, comm, DTYPES[options.dtype], options.spread)
            fill(self.decoder.parameters(), weights)
            self.cache = self.decoder.cache(self.lanes * self.slots, options.max_model_len)
        self.bytes_read = weights.bytes_read

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> Iterator[list[Token]]:
        """Serves this replica's share of `requests`; yields the tokens of each step as they become known, alike on all its
        ranks."""
        self.comm.reset()
        for moe in self.decoder.moes.values():
            moe.load.zero_()
        counts = self.counts = Counts()
        began = time.perf_counter()
        limit = self.options.max_num_batched_tokens
        schedulers = {
            replica: Scheduler(requests[replica :: self.comm.mesh.layout.dp], self.lanes, self.slots, limit)
            for replica in self.followed
        }
        flying: dict[int, tuple[Plan, Pending]] = {}
        tick = 0
        while flying or not all(scheduler.done for scheduler in schedulers.values()):
            lane = tick % self.lanes
            if lane in flying:
                plan, pending = flying.pop(lane)
                ids = self._ids(plan, pending.wait())
                for replica, step in plan.items():
                    schedulers[replica].commit(lane, step, ids[replica])
                now = time.perf_counter() - began
                if own := plan.get(self.replica):
                    done = zip(own.requests, ids[self.replica], strict=True)
                    yield [Token(r.index, i, now, r.finish_reason) for r, i in done]
            plan = {replica: planned for replica, s in schedulers.items() if (planned := s.next_step(lane))}
            if self.options.debug:
                self._agree(tick, plan)
            if plan:
                flying[lane] = (plan, self._forward(plan))
            if own := plan.get(self.replica):
                counts.ticks = tick + 1
                self._count(own)
            tick += 1
        self.comm.flush()
        counts.seconds = time.perf_counter() - began

    def _forward(self, plan: Plan) -> Pending:
        """This stage's part of a step; the ids that the last stage samples are on their way to all stages of the replica."""
        step = plan.get(self.replica) or Step(False, [], [], [], [])
        self._set_phase(plan)
        ids = torch.tensor([i for tokens in step.tokens for i in tokens], dtype=torch.int64, device=self.comm.device)
        x = pipeline.receive(self.comm, ids, self.decoder)
        parts = overlap.cut(step.tokens, step.starts, step.slots, self.options.overlap)
        replicas = [sum(map(len, plan[r].tokens)) if r in plan else 0 for r in self.followed] if self.together else None
        y = overlap.forward(self.comm, self.decoder, self.cache, x, parts, replicas)
        chosen = sample(y, step, self.decoder.head) if self.decoder.last and step.requests else None
        return pipeline.pass_on(self.comm, y, chosen, len(step.requests))

    def _ids(self, plan: Plan, own: torch.Tensor) -> dict[int, list[int]]:
        """The sampled ids of each replica that this rank follows."""
        if not self.together:
            return {self.replica: own.tolist()}
        self._set_phase(plan)
        widest = max(len(step.requests) for step in plan.values())
        everyones = self.comm.all_gather(F.pad(own, (0, widest - len(own))), "dp", "ids").tolist()
        return {replica: everyones[replica][: len(step.requests)] for replica, step in plan.items()}

    def _set_phase(self, plan: Plan) -> None:
        """Prefill and decode of different replicas may meet in a step: what is counted is this one's, if it has any."""
        steps = [plan[self.replica]] if self.replica in plan else plan.values()
        self.comm.phase = "prefill" if any(step.prefill for step in steps) else "decode"

    def _agree(self, tick: int, plan: Plan) -> None:
        """Raises if ranks that step together have not planned the same, before they wait for each other in vain."""
        text = repr([(r, step.prefill, step.slots, step.tokens, step.starts) for r, step in plan.items()])
        digest = torch.tensor([zlib.crc32(text.encode())], device=self.comm.device)
        for axis in ("tp", "pp", *(("dp",) if self.together else ())):
            digests = self.comm.all_gather(digest, axis, "plan").flatten().tolist()
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
            "experts": [
                {"layer": number, "placement": moe.placement, "tokens": moe.load.tolist()}
                for number, moe in self.decoder.moes.items()
            ],
            "comm": [
                {
                    "op": op,
                    "axis": axis,
                    "phase": phase,
                    "what": what,
                    "calls": tally.calls,
                    "payload_bytes": tally.payload_bytes,
                    "wire_bytes": tally.wire_bytes,
                    "sent_to": tally.sent_to,
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
