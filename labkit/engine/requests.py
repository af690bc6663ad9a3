"""What a caller asks for and what comes back, with vLLM's names and meanings."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the likeliest tokens that together have at least this probability (1.0: all).
        top_k: keep that many of the likeliest tokens (0 or -1: all).
        seed: of this request's noise; None takes one from the engine's seed and the request's number. Neither the
            batch nor the layout changes the noise.
        max_tokens: generate at most this many.
        stop_token_ids: end at these too, besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: use a number from 0 (greedy) up")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: use a number above 0, up to 1")
        if self.top_k < -1:
            raise ValueError(f"top_k={self.top_k}: use 0 or -1 (all tokens), or how many to keep")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: use 1 or more")


@dataclass
class Request:
    """One prompt on its way through the engine."""

    index: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int  # params.max_tokens, or less where the context ends
    output_ids: list[int] = field(default_factory=list)

    @property
    def finish_reason(self) -> str | None:
        """ "stop" after an end token, "length" after max_tokens, None while it goes on."""
        if self.output_ids and self.output_ids[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.output_ids) >= self.max_tokens else None


@dataclass(frozen=True)
class Token:
    """One generated token: of which request, when (seconds after `generate` began), and whether it was the last."""

    request: int
    id: int
    seconds: float
    finish_reason: str | None


@dataclass
class RequestMetrics:
    """Times of one request. ttft_s: from handing it in to its first token; tpot_s: mean between later tokens."""

    ttft_s: float
    tpot_s: float | None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
