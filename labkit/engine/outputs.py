"""From tokens to what a caller gets: text, as a whole or as it grows, and a RequestOutput."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from labkit.engine.requests import CompletionOutput, Request, RequestMetrics, RequestOutput, Token

Sample = tuple[Request, list[Token]]  # one of the outputs for a prompt


class TextStream:
    """The text of one output while it grows. What may be the beginning of a stop string is held back.

    tokenizer: transformers' one.
    """

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self.stops, self.end_ids, self.tokenizer = request.params.stops, request.stop_ids, tokenizer.backend_tokenizer
        self.held = max(map(len, self.stops), default=1) - 1
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.whole, self.shown = "", 0

    @property
    def text(self) -> str:
        """What can be shown so far."""
        return self.whole[: self.shown]

    def add(self, token: Token) -> str:
        """Takes in a token; returns what `text` gained."""
        before = self.shown
        if token.id not in self.end_ids:
            self.whole += self.decoder.step(self.tokenizer, token.id) or ""
        end = min([len(self.whole), *(at for stop in self.stops if (at := self.whole.find(stop)) >= 0)])
        last = end < len(self.whole) or token.finish_reason
        self.shown = end if last else max(before, len(self.whole) - self.held)
        return self.whole[before : self.shown]


def request_output(request_id: str, prompt: object, samples: Sequence[Sample], tokenizer: Any) -> RequestOutput:
    """The outputs for one prompt, all finished, or cut off by an error. tokenizer: None for a model without one."""
    times = [token.seconds for _, tokens in samples for token in tokens]
    first, last = min(times, default=0.0), max(times, default=0.0)
    longest = max(len(tokens) for _, tokens in samples)
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=samples[0][0].prompt_ids,
        outputs=[_completion(i, *sample, tokenizer) for i, sample in enumerate(samples)],
        finished=True,
        metrics=RequestMetrics(
            queue_s=min((tokens[0].queued for _, tokens in samples if tokens), default=0.0),
            ttft_s=first,
            tpot_s=(last - first) / (longest - 1) if longest > 1 else None,
            tokens_per_s=len(times) / last if times else 0.0,
        ),
        num_cached_tokens=cached_tokens(samples[0][1]),
    )


def cached_tokens(tokens: Sequence[Token]) -> int:
    """Of an output's prompt, those that the KV cache had."""
    return tokens[0].cached if tokens else 0


def _completion(index: int, request: Request, tokens: list[Token], tokenizer: Any) -> CompletionOutput:
    ids = [t.id for t in tokens]
    reason = tokens[-1].finish_reason or "error" if tokens else "error"
    stop_reason: int | str | None = None
    by_token = reason == "stop" and ids[-1] in request.stop_ids
    text = tokenizer.decode(ids[:-1] if by_token else ids, skip_special_tokens=True) if tokenizer else ""
    if by_token:
        stop_reason = ids[-1] if ids[-1] in (request.params.stop_token_ids or ()) else None
    elif found := [(text.find(stop), stop) for stop in request.params.stops if stop in text]:
        at, stop_reason = min(found)
        text = text[:at]
    logprobs, total = log_probabilities(tokens)
    return CompletionOutput(index, text, ids, reason, stop_reason, logprobs, total)


def log_probabilities(tokens: Sequence[Token]) -> tuple[list[dict[int, float]] | None, float | None]:
    """Of each token, where they were asked for, and the sum of the chosen ones'."""
    logprobs = [t.logprobs for t in tokens if t.logprobs is not None] or None
    return logprobs, sum(each[t.id] for each, t in zip(logprobs, tokens, strict=True)) if logprobs else None
