"""OpenAI's API in words: what may be asked for, and what answers, pieces of a stream and errors look like.

It knows JSON, and nothing of HTTP connections or the engine. A field that isn't supported is refused, not ignored.
"""

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from labkit.engine.requests import CompletionOutput, RequestOutput, SamplingParams

PARAMS = {field.name for field in fields(SamplingParams)}

# -- what is asked for -------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """JSON, types as they are written there. null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool = False


class Sampled(Body):
    """What both kinds of completion take. A field that is left out has SamplingParams' default, which is OpenAI's."""

    model: str
    n: int = Field(1, le=128)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # whoever it is gets the same

    def params(self, **changes: Any) -> SamplingParams:
        return SamplingParams(**{name: getattr(self, name) for name in self.model_fields_set & PARAMS} | changes)


class TextBody(Sampled):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, le=5)


class ChatBody(Sampled):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


# -- what is answered --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How a kind of completion looks.

    whole(text), piece(text, first): how a choice, or a piece of one in a stream, has its text. logprobs(tokenizer, output, start,
    k): those of its tokens from `start` on, and of the k likeliest ones.
    """

    id: str
    object: str
    chunk: str
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str, bool], dict[str, Any]]
    logprobs: Callable[[Any, CompletionOutput, int, int], dict[str, Any]]

    def head(self, model: str, stream: bool) -> dict[str, Any]:
        name = self.chunk if stream else self.object
        return {"id": f"{self.id}-{uuid.uuid4().hex}", "object": name, "created": int(time.time()), "model": model}


def _text_logprobs(tokenizer: Any, output: CompletionOutput, start: int, k: int) -> dict[str, Any]:
    texts = [tokenizer.decode([i]) for i in output.token_ids]
    new = list(zip(output.token_ids, output.logprobs or [], strict=True))[start:]
    return {
        "tokens": texts[start:],
        "token_logprobs": [logprobs[i] for i, logprobs in new],
        "top_logprobs": [{tokenizer.decode([i]): p for i, p in logprobs.items()} for _, logprobs in new],
        "text_offset": [sum(map(len, texts[:i])) for i in range(start, len(texts))],
    }


def _chat_logprobs(tokenizer: Any, output: CompletionOutput, start: int, k: int) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])  # of a part of a character "\ufffd", and then the bytes aren't known
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    new = list(zip(output.token_ids, output.logprobs or [], strict=True))[start:]
    likeliest = [sorted(logprobs.items(), key=lambda each: -each[1])[:k] for _, logprobs in new]
    return {
        "content": [
            entry(i, logprobs[i]) | {"top_logprobs": [entry(*each) for each in top]}
            for (i, logprobs), top in zip(new, likeliest, strict=True)
        ]
    }


TEXT = Style(
    "cmpl", "text_completion", "text_completion",
    lambda text: {"text": text}, lambda text, first: {"text": text}, _text_logprobs,
)  # fmt: skip
CHAT = Style(
    "chatcmpl", "chat.completion", "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text, first: {"delta": ({"role": "assistant"} if first else {}) | {"content": text}}, _chat_logprobs,
)  # fmt: skip


def usage(outputs: dict[int, RequestOutput]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs.values())
    completion = sum(len(each.token_ids) for output in outputs.values() for each in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs.values())},
    }


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error object. A message that begins with "name=" is about that field."""
    param = match[1] if status < 500 and (match := re.match(r"(\w+)[=:]", message)) else None
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "model_not_found" if status == 404 and param == "model" else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain(error: RequestValidationError) -> str:
    """The first field that doesn't fit, its value, and what would."""
    problems = error.errors()
    first, body = problems[0], error.body
    if not isinstance(body, dict) or len(first["loc"]) < 2 or first["type"] == "json_invalid":
        return f"the body is no JSON object: {first['msg']}"
    field = str(first["loc"][1])
    said = ", or ".join(dict.fromkeys(p["msg"] for p in problems if p["loc"][1] == field))
    if first["type"] == "extra_forbidden":
        said = f"{first['loc'][-1]!r} is not supported"
    return f"{field}={repr(body[field])[:200]}: {said}" if field in body else f"{field}: {said}"
