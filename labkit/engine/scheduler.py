"""Which tokens of which requests run in which step: the same decisions on every rank, from the same requests and sampled ids.

Continuous batching (Orca, OSDI 2022): requests join and leave between steps. A step takes one token of every running request
of a lane, and fills up with pieces of waiting prompts (chunked prefill, Sarathi-Serve, arXiv 2403.02310). K and V lie in
blocks; when none is left, the youngest request gives up its own and is computed again later, prompt and output, so nothing of
it is lost. With prefix caching (`engine.blocks`) a request computes only what comes behind the blocks that it finds.

Lanes keep the stages of a pipeline busy: while one lane's step is on stage 1, another's is on stage 0. A running request is
bound to a lane, since its next token needs its last; pieces of one prompt need nothing from the last stage, so they go with
whichever lane comes next and follow each other through the stages.

No clock, no random order and nothing that differs between ranks enters here.
"""

from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import chain

from labkit.engine.blocks import BlockPool
from labkit.engine.requests import Request
from labkit.split import even


@dataclass
class Step:
    """One forward pass of one lane; first the requests with one token, then those with pieces of their prompts."""

    requests: list[Request] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)  # of each, those to compute
    starts: list[int] = field(default_factory=list)  # position of the first of them
    tables: list[list[int]] = field(default_factory=list)  # cache blocks
    ends: list[bool] = field(default_factory=list)  # whether a new token is to be sampled behind them
    prompt_tokens: int = 0  # of all, those of prompts
    recomputed_tokens: int = 0  # of all, those computed a second time, after their blocks had been taken away

    @property
    def prefill(self) -> bool:
        return self.prompt_tokens + self.recomputed_tokens > 0

    @property
    def sampled(self) -> list[Request]:
        """The requests that get a new token."""
        return [request for request, end in zip(self.requests, self.ends, strict=True) if end]


class Scheduler:
    """Lanes of requests over one pool of cache blocks.

    Args:
        lanes: how many batches take turns.
        sequences: requests that may run at once, in all lanes together.
        pool: cache blocks. A request that needs more than all of them must not come here.
        budget: tokens that one step takes at most, but at least one of each running request of its lane.
    """

    def __init__(self, *, lanes: int, sequences: int, pool: BlockPool, budget: int) -> None:
        self.waiting: deque[Request] = deque()
        self.filling: list[Request] = []  # admitted, prompt not yet computed to its end; no lane is theirs yet
        self.running: list[list[Request]] = [[] for _ in range(lanes)]
        self.sequences, self.pool, self.budget = sequences, pool, budget
        self.preemptions = 0

    @property
    def done(self) -> bool:
        return not self.waiting and not self.filling and not any(self.running)

    @property
    def in_flight(self) -> int:
        """Requests that have been admitted."""
        return len(self.filling) + sum(map(len, self.running))

    def add(self, requests: Iterable[Request]) -> None:
        """Requests in order of arrival."""
        self.waiting += requests

    def abort(self, indices: Container[int]) -> None:
        """Forgets these requests. What is under way of them may write into blocks that others have got by then, but before them:
        all stages take steps in the same order."""
        for requests in (self.waiting, self.filling, *self.running):
            for request in [r for r in requests if r.index in indices]:
                request.aborted = True
                requests.remove(request)
                self._release(request)

    def next_step(self, lane: int) -> Step | None:
        """What `lane` does on its turn. None: nothing."""
        step = Step()
        if self.pool.prefix_caching:
            for request in chain(self.filling, *self.running):
                self._learn(request)  # what earlier steps compute is there for this one
        running = self.running[lane]
        for request in list(running):
            if request in running and self._grow(request, lane):  # or it was the youngest, and gave up its blocks
                self._take(step, request, 1)
        room = max(0, self.budget - len(step.requests))
        self._admit()
        singles: list[tuple[Request, int]] = []
        pieces: list[tuple[Request, int]] = []
        for request in list(self.filling):
            left = len(request.tokens) - request.computed
            n = min(left, room)
            if n < 1 or (n == left and len(running) >= self._share(lane)):
                break  # its end would bind it to this lane, which has its share already
            room -= n
            (singles if n == 1 else pieces).append((request, n))
            if n == left:
                self.filling.remove(request)
                running.append(request)
        for request, n in singles + pieces:
            self._take(step, request, n)
        return step if step.requests else None

    def commit(self, lane: int, step: Step, ids: list[int]) -> None:
        """Takes the sampled `ids`, one for each of `step.sampled`; those that are finished leave."""
        for request, token in zip(step.sampled, ids, strict=True):
            if request.aborted:
                continue
            request.take(token)
            if request.finish_reason:
                self.running[lane].remove(request)
                self._release(request)

    def _share(self, lane: int) -> int:
        """An even share of all requests, so that one lane doesn't take what would keep the others busy."""
        total = len(self.waiting) + self.in_flight
        return len(even(min(total, self.sequences), len(self.running))[lane])

    def _admit(self) -> None:
        """Lets waiting requests in, first come first served, as long as their tokens so far and one more have blocks."""
        size = self.pool.size
        while self.waiting and self.in_flight < self.sequences:
            request = self.waiting[0]
            shared, text = self.pool.known(request.tokens)
            next_block = (len(shared) + 1) * size
            if self.pool.prefix_caching and next_block < len(request.tokens):
                beginning = request.tokens[:next_block]
                if any(other.tokens[:next_block] == beginning for other in self.filling):
                    return  # another one is computing what this one needs next
            blocks = self.pool.take(-(-(len(request.tokens) + 1) // size), shared)
            if blocks is None:
                return
            self.waiting.popleft()
            request.blocks, request.learned, request.text_number = blocks, len(shared), text
            request.computed = max(request.computed, len(shared) * size)  # a dry run's come with their prompt computed
            if not request.recompute:
                request.cached = len(shared) * size
            self.filling.append(request)

    def _grow(self, request: Request, lane: int) -> bool:
        """Finds a block for the next token of a running request; False if it had to give up its own."""
        while len(request.blocks) * self.pool.size <= request.computed:
            if block := self.pool.take(1):
                request.blocks += block
                continue
            # Requests of other lanes may be under way; those still filling have sampled nothing.
            victim = (self.filling or self.running[lane])[-1]
            self._preempt(victim, lane)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, lane: int) -> None:
        (self.filling if request in self.filling else self.running[lane]).remove(request)
        self._release(request)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _learn(self, request: Request) -> None:
        """Tells the pool what the request's full blocks hold. Not while a step is planned, which would read what it computes."""
        size = self.pool.size
        while self.pool.prefix_caching and (request.learned + 1) * size <= request.computed:
            at = request.learned
            tokens = request.tokens[at * size : (at + 1) * size]
            request.text_number = self.pool.learn(request.text_number, request.blocks[at], tokens)
            request.learned += 1

    def _release(self, request: Request) -> None:
        self._learn(request)
        self.pool.give_back(request.blocks)
        request.recompute = max(request.recompute, request.computed)
        request.blocks, request.computed, request.learned, request.text_number = [], 0, 0, 0

    def _take(self, step: Step, request: Request, n: int) -> None:
        start, stop = request.computed, request.computed + n
        step.requests.append(request)
        step.tokens.append(request.tokens[start:stop])
        step.starts.append(start)
        step.tables.append(list(request.blocks))
        step.ends.append(stop == len(request.tokens))
        again = max(0, min(stop, request.recompute) - start)
        step.recomputed_tokens += again
        step.prompt_tokens += max(0, min(stop, len(request.prompt_ids)) - max(start, request.recompute))
        request.computed = stop
