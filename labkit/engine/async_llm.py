"""`AsyncLLM`: requests that come and go while others are served, for asyncio, with vLLM's names.

It keeps one running engine: a message to the ranks adds requests or takes some back, and they take it in between two steps. A
thread reads what the ranks send. It knows nothing of HTTP.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from labkit.engine.llm import LIVE, LLM, Prompt
from labkit.engine.outputs import TextStream, cached_tokens, log_probabilities, request_output
from labkit.engine.requests import (
    Abort,
    CompletionOutput,
    InFlight,
    Progress,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Token,
)  # fmt: skip
from labkit.launch.local import RankError, RankGroup
from labkit.model.find import DEFAULT


@dataclass
class _Caller:
    """Somebody who waits for tokens."""

    indices: frozenset[int]
    loop: asyncio.AbstractEventLoop
    tokens: "asyncio.Queue[tuple[Token, float] | BaseException | None]"  # with when they came; None: aborted

    def tell(self, what: "tuple[Token, float] | BaseException | None") -> None:
        self.loop.call_soon_threadsafe(self.tokens.put_nowait, what)


class AsyncLLM:
    """A model served to many callers at once.

    Args:
        model, options: as `LLM`'s. Ranks are started here; torchrun's can't be used.

    Attributes:
        llm: the tokenizer, the model, the layout. After `close`, its report is that of all that was served.

    Raises what `LLM` raises, and RankError from every call once a rank has failed. With restart=True ranks are replaced instead,
    and callers only wait longer.
    """

    def __init__(self, model: str = DEFAULT, **options: Any) -> None:
        self.llm = LLM(model, **options)
        self._group: RankGroup | None = self.llm.ranks()  # None: they are being replaced
        self._lock = threading.Lock()  # messages reach all ranks in one order
        self._in_flight = InFlight(self.llm.restart)
        self._closing = False
        self._callers: dict[int, _Caller] = {}  # by request
        self._by_id: dict[str, _Caller] = {}
        self._next = 0
        self._progress: dict[int, Progress] = {}  # the last of each replica
        self._totals = {"steps": 0, "prompt_tokens": 0, "cached_tokens": 0, "generation_tokens": 0}
        self._failed: BaseException | None = None
        self._group.send(LIVE)
        self._reader = threading.Thread(target=self._read, name="labkit-reader", daemon=True)
        self._reader.start()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yields what there is of a prompt's outputs, again and again with what came in between, until it is `finished`.

        Left early, the request is aborted. Raises ValueError for what can't be served, RankError when a rank fails.
        """
        if self._failed:
            raise self._failed
        [requests] = self.llm.requests([prompt], sampling_params, self._next)
        name = request_id if request_id is not None else str(self._next)
        if name in self._by_id:
            raise ValueError(f"request_id={name!r} is being served already")
        self._next += len(requests)
        began = time.perf_counter()
        caller = _Caller(frozenset(r.index for r in requests), asyncio.get_running_loop(), asyncio.Queue())
        self._by_id[name] = caller
        samples: dict[int, tuple[Request, list[Token]]] = {r.index: (r, []) for r in requests}
        tokenizer = self.llm.tokenizer if self.llm.model.folder else None
        streams = {r.index: TextStream(r, tokenizer) for r in requests} if tokenizer else {}
        going = set(caller.indices)
        try:
            with self._lock:
                self._callers |= dict.fromkeys(caller.indices, caller)
                if self._failed:  # since it was asked above
                    raise self._failed
                self._in_flight.add(requests)
                self._send(requests)
            while going:
                news = [await caller.tokens.get()]
                while not caller.tokens.empty():
                    news.append(caller.tokens.get_nowait())
                for what in news:
                    if isinstance(what, BaseException):
                        raise what
                    if what is None:
                        going.clear()
                        yield self._so_far(name, prompt, samples, streams, began, "abort")
                        return
                    token, came = what
                    samples[token.request][1].append(replace(token, seconds=came - began))
                    if streams:
                        streams[token.request].add(token)
                    if token.finish_reason:
                        going.discard(token.request)
                if going:
                    yield self._so_far(name, prompt, samples, streams, began, None)
            output = request_output(name, prompt, list(samples.values()), tokenizer)
            self._totals["prompt_tokens"] += len(output.prompt_token_ids)
            self._totals["cached_tokens"] += output.num_cached_tokens
            yield output
        finally:
            self._by_id.pop(name, None)
            with self._lock:
                for index in caller.indices:
                    self._callers.pop(index, None)
                self._in_flight.forget(caller.indices)
                if going and not self._failed:
                    self._send(Abort(frozenset(going)))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its `generate` yields what there is, with finish_reason "abort". Nothing happens for one unknown."""
        if caller := self._by_id.get(request_id):
            with self._lock:
                self._send(Abort(caller.indices))
            caller.tell(None)

    def stats(self) -> dict[str, int]:
        """Where the engine stands: requests running and waiting, blocks of KV cache used and there, on all replicas together;
        preemptions, restarts, steps that gave tokens, and tokens of prompts (of them, those that were in the cache) and outputs
        served so far."""
        seen = self._progress.values()
        fields = {"running": "running", "waiting": "waiting", "kv_blocks_used": "blocks_used", "kv_blocks": "blocks"}
        sums = {name: sum(getattr(p, field) for p in seen) for name, field in fields.items()}
        if not self._callers:
            sums |= {"running": 0, "waiting": 0, "kv_blocks_used": 0}
        events = {"preemptions": sum(p.preemptions for p in seen), "restarts": self.llm.restarts}
        return sums | events | self._totals

    @property
    def failed(self) -> BaseException | None:
        """Why nothing can be served any more, if so."""
        return self._failed

    def close(self) -> None:
        """Ends the engine and its ranks. Callers that still wait get a RankError."""
        if self._reader.is_alive() and not self._failed:
            with self._lock:
                self._closing = True
                self._send(None)
            self._reader.join()
        self._fail(RankError("the engine has been closed"))
        self.llm.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: list[Request] | Abort | str | None) -> None:
        """To the ranks, if there are any: those that come will be told what matters by then. The caller has the lock."""
        if self._group:
            self._group.send(message)

    def _read(self) -> None:
        """Hands out what the ranks send, in a thread of its own, until all replicas have said the end."""
        try:
            while True:
                try:
                    return self._hand_out(self._group or self._restarted())
                except RankError:
                    with self._lock:
                        self._group = None
                        if self._closing or not self._in_flight.again():
                            raise
                    self.llm.close()
                    self.llm.restarts += 1
        except BaseException as error:
            self._fail(error)

    def _restarted(self) -> RankGroup:
        group = self.llm.ranks()
        with self._lock:
            self._group = group
            self._send(LIVE)
            self._send(self._in_flight.left())
            if self._closing:
                self._send(None)
        return group

    def _hand_out(self, group: RankGroup) -> None:
        replicas = self.llm.layout.dp
        while replicas:
            _, message = group.receive()
            came = time.perf_counter()
            if isinstance(message, dict):
                replicas -= 1
                self.llm.take_reports(message)
                continue
            for step in message:
                self._progress[step.replica] = step
                self._totals["steps"] += 1
                self._totals["generation_tokens"] += len(step.tokens)
                self._in_flight.take(step.tokens)
                for token in step.tokens:
                    if caller := self._callers.get(token.request):
                        caller.tell((token, came))

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or error
        for caller in list(self._by_id.values()):
            caller.tell(error)

    def _so_far(
        self, name: str, prompt: Prompt, samples: dict[int, tuple[Request, list[Token]]], streams: dict[int, TextStream],
        began: float, reason: str | None,
    ) -> RequestOutput:  # fmt: skip
        outputs = []
        request, its = next(iter(samples.values()))
        for i, (index, (_, tokens)) in enumerate(samples.items()):
            ended = tokens[-1].finish_reason if tokens else None
            text = streams[index].text if streams else ""
            ids = [token.id for token in tokens]
            outputs.append(CompletionOutput(i, text, ids, ended or reason, None, *log_probabilities(tokens)))
        first = min((tokens[0].seconds for _, tokens in samples.values() if tokens), default=0.0)
        now = time.perf_counter() - began
        count = sum(len(tokens) for _, tokens in samples.values())
        queued = min((tokens[0].queued for _, tokens in samples.values() if tokens), default=now)
        return RequestOutput(
            name, prompt if isinstance(prompt, str) else None, request.prompt_ids, outputs, reason is not None,
            RequestMetrics(queued, first, None, count / now), cached_tokens(its),
        )  # fmt: skip
