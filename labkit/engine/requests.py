"""What a caller asks for and what comes back, with vLLM's names and meanings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

RESTARTS = 3  # of ranks that fail, until a request finishes


def _whole(value: Any, low: float = -inf, high: float = inf) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and low <= int(value) <= high


def _real(value: Any, low: float = -inf, high: float = inf) -> bool:
    """A number that is neither infinite nor NaN."""
    return not isinstance(value, bool) and isinstance(value, Real) and isfinite(value) and low <= float(value) <= high


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens.

    Args:
        n: how many outputs to generate for a prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the likeliest tokens that together have at least this probability (1.0: all).
        top_k: keep that many of the likeliest tokens (0 or -1: all).
        min_p: keep tokens with at least this part of the likeliest one's probability (0.0: all).
        presence_penalty, frequency_penalty: subtracted from the logits of tokens generated so far, once, and once for each
            time (-2 to 2).
        repetition_penalty: logits of tokens in the prompt or generated so far are divided by it if positive, else multiplied.
        seed: of this request's noise; None takes one from the engine's seed and the request's number. Neither the
            batch nor the layout changes the noise.
        max_tokens: generate at most this many.
        stop: strings that end the output; it doesn't include them.
        stop_token_ids: end at these too, besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
        logprobs: of each generated token, the log probability of it and of that many likeliest ones (None: of none).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop: Any = self.stop or ()
        ids: Any = self.stop_token_ids or ()
        for name, fits, legal in (
            ("n", _whole(self.n, 1, 2**14), "a whole number from 1 to 16384"),
            ("temperature", _real(self.temperature, 0), "a number from 0 (greedy) up"),
            ("top_p", _real(self.top_p, 0, 1) and self.top_p > 0, "a number above 0, up to 1"),
            ("top_k", _whole(self.top_k, -1), "0 or -1 (all tokens), or the whole number of those to keep"),
            ("min_p", _real(self.min_p, 0, 1), "a number from 0 to 1"),
            ("presence_penalty", _real(self.presence_penalty, -2, 2), "a number from -2 to 2"),
            ("frequency_penalty", _real(self.frequency_penalty, -2, 2), "a number from -2 to 2"),
            (
                "repetition_penalty",
                _real(self.repetition_penalty, 0) and self.repetition_penalty > 0,
                "a number above 0",
            ),
            ("seed", self.seed is None or _whole(self.seed), "None, or a whole number"),
            ("max_tokens", _whole(self.max_tokens, 1), "a whole number, 1 or more"),
            ("logprobs", self.logprobs is None or _whole(self.logprobs, 0), "None, or a whole number, 0 or more"),
            (
                "stop",
                isinstance(stop, Iterable) and all(isinstance(each, str) and each for each in self.stops),
                "strings that are not empty",
            ),
            ("stop_token_ids", isinstance(ids, Iterable) and all(map(_whole, ids)), "a list of token ids"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {legal}")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: as in vLLM, also where logits / temperature would overflow."""
        return self.temperature < 1e-5

    @property
    def restricts(self) -> bool:
        """Whether it leaves out tokens, which is a question about the whole vocabulary."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass(eq=False)  # one is itself alone, and quickly found among others
class Request:
    """One prompt on its way through the engine, to one output. `index` is its place among all outputs asked for."""

    index: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int  # params.max_tokens, or less where the context ends
    output_ids: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # prompt and output
    computed: int = 0  # of these, those whose K and V are in the cache
    recompute: int = 0  # how many had been there when the request last lost its blocks
    cached: int = 0  # of the tokens it came with, those whose K and V were in the cache already
    blocks: list[int] = field(default_factory=list)
    learned: int = 0  # how many of them the pool knows, and the number that it gave their text (`engine.blocks`)
    text_number: int = 0
    aborted: bool = False
    text: str = ""  # of the output; kept only if there are strings to stop at
    detokenizer: Callable[[int], str | None] | None = None

    def __post_init__(self) -> None:
        self.tokens = [*self.prompt_ids, *self.output_ids]

    def take(self, token: int) -> None:
        """Appends a sampled token."""
        self.output_ids.append(token)
        self.tokens.append(token)
        if self.detokenizer:
            self.text += self.detokenizer(token) or ""

    @property
    def finish_reason(self) -> str | None:
        """ "stop" after an end token or string, "length" after max_tokens, "abort"; None while it goes on."""
        if self.aborted:
            return "abort"
        if self.output_ids and self.output_ids[-1] in self.stop_ids:
            return "stop"
        if any(stop in self.text for stop in self.params.stops):
            return "stop"
        return "length" if len(self.output_ids) >= self.max_tokens else None


class InFlight:
    """Requests that ranks are serving, as their caller knows them: when ranks fail, others can go on from here.

    What a request has got so far goes before what is still to come, so its noise, penalties and limits stay what they were. Two
    threads may use it.
    """

    def __init__(self, restart: bool) -> None:
        self._restart = restart
        self._requests: dict[int, Request] = {}
        self._in_vain = 0  # restarts since a request has finished

    def add(self, requests: Iterable[Request]) -> None:
        self._requests |= {request.index: request for request in requests}

    def take(self, tokens: Iterable["Token"]) -> None:
        """Notes what the ranks send."""
        for token in tokens:
            if request := self._requests.get(token.request):
                request.take(token.id)
                request.recompute = len(request.tokens) - 1
                if token.finish_reason:
                    self.forget([token.request])
                    self._in_vain = 0

    def forget(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._requests.pop(index, None)

    def left(self) -> list[Request]:
        """What other ranks are to go on with, in order of arrival."""
        return list(self._requests.values())

    def again(self) -> bool:
        """Whether ranks that have failed are to be replaced: if that is wanted, and was not in vain time after time."""
        self._in_vain += 1
        return self._restart and self._in_vain <= RESTARTS


@dataclass(frozen=True)
class Token:
    """One generated token: of which request, when (seconds after `generate` began), and why it was the last, if it was.

    queued: seconds from the request's arrival until it was first computed. cached: tokens of its prompt that were not, since the
    KV cache had them. logprobs: of this and of the likeliest tokens, by id.
    """

    request: int
    id: int
    seconds: float
    finish_reason: str | None
    queued: float
    cached: int = 0
    logprobs: dict[int, float] | None = None


@dataclass(frozen=True)
class Progress:
    """What one step of a replica brought: tokens; and where it stands after it, in requests and blocks of KV cache."""

    tokens: list[Token]
    replica: int
    running: int
    waiting: int
    blocks_used: int
    blocks: int
    preemptions: int


@dataclass(frozen=True)
class Abort:
    """A message to a running engine: forget these requests."""

    indices: frozenset[int]


Message = list[Request] | Abort | None  # to a running engine; None: end


@dataclass
class RequestMetrics:
    """Times of one request, in seconds. queue_s: from handing it in until it was first computed; ttft_s: to its first token;
    tpot_s: mean between later tokens; tokens_per_s: of its own output, from handing it in to the end."""

    queue_s: float
    ttft_s: float
    tpot_s: float | None
    tokens_per_s: float


@dataclass
class CompletionOutput:
    """One output. logprobs: for each token the log probabilities by id; stop_reason: the string or token it stopped at."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, float]] | None = None
    cumulative_logprob: float | None = None


@dataclass
class RequestOutput:
    """What came of a prompt. num_cached_tokens: its tokens that the KV cache had when the first output began."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
