"""The loop that every rank runs: the same schedule everywhere, this rank's part of the model, ids back to all.

It knows token ids and requests, not text. `Engine` is one rank's; ranks meet only in `Comm`.
"""

import contextlib
import ctypes
import os
import resource
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from labkit.comm import Comm, Pending, Tally
from labkit.engine.blocks import BlockPool
from labkit.engine.graphs import DecodeGraphs
from labkit.engine.requests import Abort, Message, Progress, Request, Token
from labkit.engine.sampling import sample
from labkit.engine.scheduler import Scheduler, Step
from labkit.launch.rank import Channel
from labkit.model.checkpoint import fill
from labkit.model.decoder import Decoder
from labkit.model.find import Model
from labkit.parallel import overlap, pipeline
from labkit.parallel.expert import Spread

BLOCK = 16  # tokens in a block of the KV cache
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineOptions:
    """What all ranks must agree on before they load: numbers of sequences and tokens, dtype name, seed of random weights.

    overlap: how a step is cut so that its communication is hidden (`parallel.overlap`). spread: which rank has which experts,
    and how tokens reach them (`parallel.expert`). prefix_caching: what requests begin with alike is computed once, and kept from
    one `generate` to the next (`engine.blocks`). enforce_eager: no CUDA graphs (`engine.graphs`). trace: keep each operation's
    times. debug: compare each step's plan over the ranks that take it together, and name the one that differs.
    """

    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    seed: int
    overlap: str = "none"
    kv_cache_tokens: int | None = None
    spread: Spread = field(default_factory=Spread)
    prefix_caching: bool = False
    enforce_eager: bool = False
    trace: bool = False
    debug: bool = False


Plan = dict[int, Step]  # what each replica does in a step, of those that a rank follows


@dataclass
class Counts:
    """What one `generate` did on one rank."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that were not computed: their K and V were in the cache
    prefill_steps: int = 0
    decode_tokens: int = 0  # tokens sampled in decode steps, those without any prompt tokens
    decode_steps: int = 0
    preemptions: int = 0  # times that a request gave up its cache blocks
    recomputed_tokens: int = 0
    ticks: int = 0  # turns of the lanes from the first step to the last, with or without work
    seconds: float = 0.0


class Engine:
    """One rank's part of the model, loaded, with its KV cache."""

    def __init__(self, model: Model, comm: Comm, options: EngineOptions) -> None:
        self.comm, self.options = comm, options
        self.model, self.lanes = model, comm.mesh.layout.pp
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
            self.cache = self.decoder.cache(self._blocks(), BLOCK)
        self.pools: dict[int, BlockPool] = {}  # by replica; none while requests are being served
        self.graphs = DecodeGraphs(self.decoder, self.cache, comm) if self._recordable() else None
        self.bytes_read = weights.bytes_read
        _keep_freed_memory()

    def _recordable(self) -> bool:
        """Whether decode steps can be CUDA graphs: nothing in them that the host must know, or do."""
        mesh, options = self.comm.mesh, self.options
        on_device = (
            mesh.device.type == "cuda" and (mesh.backend == "nccl" or mesh.world_size == 1) and not self.comm.link
        )
        return on_device and not (options.enforce_eager or options.overlap != "none" or self.model.config.moe)

    def _blocks(self) -> int:
        """How many blocks of KV cache each rank can have: as many as `max_num_seqs` of the longest sequences need, or fewer
        where memory is short on any rank."""
        longest, count = -(-self.options.max_model_len // BLOCK), self.options.max_num_seqs
        wanted = longest * count if self.options.kv_cache_tokens is None else -(-self.options.kv_cache_tokens // BLOCK)
        fits = int(_free_memory(self.comm.device, self.comm.mesh.ranks_here) // self.decoder.cache(1, BLOCK).bytes)
        everyones = self.comm.all_gather(torch.tensor([min(wanted, fits)], device=self.comm.device), "world", "plan")
        blocks = int(everyones.min())
        if blocks < longest:
            raise ValueError(
                f"the KV cache has room for {blocks * BLOCK} tokens, max_model_len={self.options.max_model_len} needs "
                f"{longest * BLOCK}: use a smaller max_model_len, a larger kv_cache_tokens, or more ranks"
            )
        return blocks

    @torch.inference_mode()
    def generate(self, requests: list[Request], inbox: "Inbox | None" = None) -> Iterator[Progress]:
        """Serves this replica's share of `requests`, and of those that arrive meanwhile through `inbox`, until it says the end.

        Yields the tokens of each step as they become known, alike on all ranks of the replica.
        """
        self.comm.reset()
        for moe in self.decoder.moes.values():
            moe.load.zero_()
        counts = self.counts = Counts()
        began = time.perf_counter()
        # A run that is given up half-way leaves none: what it had planned may never have been computed.
        pools, self.pools = self.pools, {}
        schedulers = {
            replica: Scheduler(
                lanes=self.lanes, sequences=self.options.max_num_seqs, budget=self.options.max_num_batched_tokens,
                pool=pools.get(replica) or BlockPool(self.cache.blocks, BLOCK, self.options.prefix_caching),
            )
            for replica in self.followed
        }  # fmt: skip
        own = schedulers[self.replica]
        arrived: dict[int, float] = {}  # seconds, of this replica's requests that have not finished
        queued: dict[int, float] = {}
        self._admit(schedulers, requests)
        arrived |= {request.index: 0.0 for request in own.waiting}
        # The step planned at this tick, at the one before, ...: as many as there are stages, each of which has one of them.
        steps: deque[Plan] = deque([{}] * self.lanes, self.lanes)
        stage = self.comm.mesh.pp_rank
        hidden: Pending | None = None  # from the stage before
        tick = 0
        while any(steps) or inbox or not all(scheduler.done for scheduler in schedulers.values()):
            idle = not any(steps) and all(scheduler.done for scheduler in schedulers.values())
            for message in inbox.next(idle) if inbox else ():
                now = time.perf_counter() - began
                if message is None:
                    inbox = None
                    for scheduler in schedulers.values():
                        scheduler.abort(range(2**63))
                elif isinstance(message, Abort):
                    for scheduler in schedulers.values():
                        scheduler.abort(message.indices)
                else:
                    self._admit(schedulers, message)
                    arrived |= {r.index: now for r in message if r.index % self.comm.mesh.layout.dp == self.replica}
            lane = tick % self.lanes
            plan = {replica: planned for replica, s in schedulers.items() if (planned := s.next_step(lane))}
            steps.appendleft(plan)
            if self.options.debug:
                self._agree(tick, plan)
            if mine := plan.get(self.replica):
                counts.ticks = tick + 1
                self._count(mine)
                for request in mine.requests:
                    if request.index not in queued:
                        queued[request.index] = time.perf_counter() - began - arrived[request.index]
                        counts.cached_tokens += request.cached
            # What comes for the next tick is awaited from now on, so that it can arrive meanwhile.
            later = self._expect(steps[stage - 1]) if stage else None
            y = self._forward(steps[stage], hidden) if steps[stage] else None
            hidden, tick = later, tick + 1
            if plan := steps[-1]:  # the last stage has done its layers
                steps[-1] = {}
                sampled = self._choose(plan, y)
                self.comm.flush(keep=2 * self.lanes)
                ids = self._ids(plan, sampled)
                for replica, step in plan.items():
                    schedulers[replica].commit(tick % self.lanes, step, ids[replica])
                now = time.perf_counter() - began
                if (step := plan.get(self.replica, Step())).sampled:
                    rows = zip(step.sampled, self._look(sampled), strict=True)
                    tokens = [_token(r, row, now, queued[r.index]) for r, row in rows if not r.aborted]
                    for token in tokens:
                        if token.finish_reason:
                            del arrived[token.request], queued[token.request]
                    blocks = own.pool.blocks
                    yield Progress(
                        tokens, self.replica, own.in_flight, len(own.waiting), blocks - own.pool.room, blocks, own.preemptions
                    )  # fmt: skip
        self.comm.flush()
        if self.graphs:
            self.graphs.settle()
        counts.seconds = time.perf_counter() - began
        counts.preemptions = own.preemptions
        if self.options.prefix_caching:
            self.pools = {replica: scheduler.pool for replica, scheduler in schedulers.items()}

    def _admit(self, schedulers: dict[int, Scheduler], requests: list[Request]) -> None:
        """Hands requests to their replicas, in turn by number."""
        self._watch_for_stops(requests)
        for replica, scheduler in schedulers.items():
            scheduler.add(r for r in requests if r.index % self.comm.mesh.layout.dp == replica)

    def _expect(self, plan: Plan) -> Pending | None:
        """The residual that the stage before is going to send for a step."""
        step = plan.get(self.replica) or Step()
        return pipeline.expect(self.comm, self.decoder, sum(map(len, step.tokens))) if plan else None

    def _forward(self, plan: Plan, hidden: Pending | None) -> torch.Tensor:
        """This stage's layers in a step: the residual (N, hidden), or of the last stage what the head makes logits of."""
        step = plan.get(self.replica) or Step()
        self._set_phase(plan)
        if hidden:
            x = hidden.wait()
        else:
            ids = [i for tokens in step.tokens for i in tokens]
            x = torch.tensor(ids, dtype=torch.int64, device=self.comm.device)
        parts = overlap.cut(step.tokens, step.starts, step.tables, step.ends, self.options.overlap)
        replicas = [sum(map(len, plan[r].tokens)) if r in plan else 0 for r in self.followed] if self.together else None
        if self.graphs and self.graphs.takes(parts):
            y = self.graphs.forward(x, parts[0])
        else:
            y = overlap.forward(self.comm, self.decoder, self.cache, x, parts, replicas)
        pipeline.pass_on(self.comm, y)
        return y

    def _choose(self, plan: Plan, y: torch.Tensor | None) -> torch.Tensor:
        """What `sample` gives for a step, on all ranks of the replica. y: on the last stage what `_forward` made of it."""
        step = plan.get(self.replica) or Step()
        if not step.sampled:
            return torch.empty(0, dtype=torch.int64, device=self.comm.device)
        self._set_phase(plan)
        rows = pipeline.share(self.comm, self.decoder, y, len(step.sampled))
        return sample(self.decoder.head(rows), step.sampled, self.decoder.head)

    def _ids(self, plan: Plan, sampled: torch.Tensor) -> dict[int, list[int]]:
        """The sampled ids of each replica that this rank follows."""
        own = (sampled[:, 0] if sampled.dim() == 2 else sampled).long()
        if not self.together:
            return {self.replica: self._look(own)}
        self._set_phase(plan)
        widest = max(len(step.sampled) for step in plan.values())
        everyones = self.comm.all_gather(F.pad(own, (0, widest - len(own))), "dp", "ids") if widest else own
        rows = self._look(everyones)
        return {replica: rows[replica][: len(step.sampled)] if widest else [] for replica, step in plan.items()}

    def _look(self, x: torch.Tensor) -> list[Any]:
        """Numbers of a computed tensor, on the host: waits for the device. (A dry run has none, and gives zeros.)"""
        return x.tolist()

    def _watch_for_stops(self, requests: list[Request]) -> None:
        """Gives requests that end at a string what turns their tokens into text, and the text of those that they come with."""
        watched = [request for request in requests if request.params.stops]
        if watched and self.model.folder:
            tokenizer = Tokenizer.from_file(str(self.model.folder / "tokenizer.json"))
            for request in watched:
                request.detokenizer = partial(DecodeStream(skip_special_tokens=True).step, tokenizer)
                request.text = "".join(request.detokenizer(token) or "" for token in request.output_ids)

    def _set_phase(self, plan: Plan) -> None:
        """Prefill and decode of different replicas may meet in a step: what is counted is this one's, if it has any."""
        steps = [plan[self.replica]] if self.replica in plan else plan.values()
        self.comm.phase = "prefill" if any(step.prefill for step in steps) else "decode"

    def _agree(self, tick: int, plan: Plan) -> None:
        """Raises if ranks that step together have not planned the same, before they wait for each other in vain."""
        text = repr([(r, step.tables, step.tokens, step.starts) for r, step in plan.items()])
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
        self.counts.recomputed_tokens += step.recomputed_tokens
        self.counts.prompt_tokens += step.prompt_tokens
        if step.prefill:
            self.counts.prefill_steps += 1
        else:
            self.counts.decode_steps += 1
            self.counts.decode_tokens += len(step.requests)

    def report(self) -> dict[str, Any]:
        """What this rank holds, and what the last `generate` did and sent."""
        mesh = self.comm.mesh
        place = mesh.layout.place(self.comm.rank)
        counts = self.counts
        tokens = {"prefill": counts.prompt_tokens, "decode": counts.decode_tokens}
        steps = counts.prefill_steps + counts.decode_steps
        # Every step spends one tick on each stage; a lane's turn reaches the last stage pp - 1 ticks after the first.
        span = counts.ticks + mesh.layout.pp - 1
        return {
            "rank": self.comm.rank,
            "pid": os.getpid(),
            "stage": place["pp"],
            "place": place,
            "host": sorted(set(mesh.hosts), key=mesh.hosts.index).index(mesh.hosts[mesh.rank]),
            "ranks_here": mesh.ranks_here,
            "layers": len(self.decoder.layers),
            "weights_bytes": self.decoder.weights_bytes,
            "bytes_read": self.bytes_read,
            "kv_bytes": self.cache.bytes,
            "peak_rss_bytes": _peak_rss(),
            "bubble_fraction": 1 - steps / span if steps else 0.0,
            "prompt_tokens": counts.prompt_tokens,
            "cached_tokens": counts.cached_tokens,
            "prefill_steps": counts.prefill_steps,
            "decode_tokens": counts.decode_tokens,
            "decode_steps": counts.decode_steps,
            "recomputed_tokens": counts.recomputed_tokens,
            "preemptions": counts.preemptions,
            "seconds": counts.seconds,
            "shared_memory": sorted(self.comm.shared),
            "events": self.comm.events,
            "experts": [
                {"layer": number, "placement": moe.placement, "tokens": self._look(moe.load)}
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
                    "between_hosts_bytes": self._between_hosts(axis, tally),
                    "seconds": tally.seconds,
                    "hidden_seconds": tally.hidden_seconds,
                    "tokens": tokens.get(phase, 0),
                }
                for (op, axis, phase, what), tally in self.comm.tallies.items()
            ],
        }

    def _between_hosts(self, axis: str, tally: Tally) -> int:
        """Of what was sent, the bytes that went to another host."""
        mesh = self.comm.mesh
        if tally.sent_to:
            to = zip(mesh.peers(axis), tally.sent_to, strict=True)
            return sum(sent for peer, sent in to if mesh.hosts[peer] != mesh.hosts[mesh.rank])
        return tally.wire_bytes * mesh.layout.crosses(mesh.rank, axis, mesh.hosts)


class Inbox:
    """What comes in while an engine runs, on all ranks that take steps together at the same tick.

    Each rank has a line of its own to the launcher, and messages arrive in the same order but not at the same time. So one
    rank says how many it has seen, and the others wait for as many.
    """

    def __init__(self, channel: Channel, engine: Engine) -> None:
        self.channel, self.comm = channel, engine.comm
        self.axis = "replica" if engine.comm.mesh.layout.dp > 1 and not engine.together else "world"
        self.received: deque[Message] = deque()
        self.taken = 0

    def next(self, idle: bool) -> list[Message]:
        """The messages to take in at this tick. If the engine is `idle`, waits for one."""
        while self.channel.waiting():
            self.received.append(self.channel.receive())
        count = self.taken + 1
        if not idle:
            word = torch.tensor([self.taken + len(self.received)], device=self.comm.device)
            count = int(self.comm.all_gather(word, self.axis, "plan")[0])
        messages: list[Message] = []
        while self.taken < count:
            messages.append(self.received.popleft() if self.received else self.channel.receive())
            self.taken += 1
        return messages


def _peak_rss() -> int:
    """Most memory this process has held, in bytes (shared pages of libraries included)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _keep_freed_memory() -> None:
    """Has the C library (glibc; others aren't asked) keep what a step frees for the next one. Given back to the system, it
    would come again page by page: 2,000 pages for a prompt of 512 tokens, each a microsecond or many."""
    trim_threshold, mmap_threshold = -1, -3  # M_... of malloc.h
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _free_memory(device: torch.device, ranks: int) -> float:
    """Bytes that this rank may fill with KV cache: nine tenths of what is free, shared with the ranks that share the device."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0] / -(-ranks // torch.cuda.device_count())
    return 0.9 * psutil.virtual_memory().available / ranks


def _token(request: Request, row: Any, now: float, queued: float) -> Token:
    """A sampled id, or a row of `sample` that has log probabilities too."""
    wanted = request.params.logprobs
    if not isinstance(row, list):
        return Token(request.index, row, now, request.finish_reason, queued, request.cached)
    token, logprob, half = int(row[0]), row[1], len(row) // 2 - 1
    logprobs = None
    if wanted is not None:
        likeliest = zip(map(int, row[2 : 2 + wanted]), row[2 + half :], strict=False)
        logprobs = {token: logprob, **dict(likeliest)}
    return Token(request.index, token, now, request.finish_reason, queued, request.cached, logprobs)
