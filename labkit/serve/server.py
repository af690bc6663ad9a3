"""`labkit serve`: OpenAI's HTTP API over `AsyncLLM`, in any layout.

It knows HTTP and clients, and nothing of ranks. A client that goes away takes its requests with it.
"""

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException

from labkit.engine.async_llm import AsyncLLM
from labkit.engine.llm import LLM, Prompt
from labkit.engine.requests import CompletionOutput, RequestOutput, SamplingParams
from labkit.launch.local import RankError
from labkit.serve.api import CHAT, TEXT, ChatBody, Sampled, Style, TextBody, error_body, explain, usage
from labkit.serve.metrics import Metrics

GOODBYE = 3  # seconds that clients get to hear of the end, after SIGTERM or Ctrl-C
CARD = ("layout", "hardware", "backend", "dtype", "threads_per_rank", "oversubscribed", "link", "ranks")  # of a report
Outputs = AsyncGenerator[RequestOutput, None]
Numbered = AsyncGenerator[tuple[int, RequestOutput], None]  # by prompt of a request
T = TypeVar("T")


class _Gone(Exception):
    """The client has gone away."""


def application(llm: AsyncLLM) -> FastAPI:
    """The routes, over a running engine."""
    app, metrics, name, report = FastAPI(openapi_url=None), Metrics(llm), llm.llm.model.name, llm.llm.report()
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "labkit"}
    card |= {key: getattr(llm.llm.options, key) for key in ("max_model_len", "max_num_seqs")}
    card |= {key: report[key] for key in CARD}

    def known(model: str) -> None:
        if model != name:
            raise HTTPException(404, f"model={model!r} is not served here: use {name!r}")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        known(model)
        return card

    @app.get("/health")
    async def health() -> Response:
        return _error(503, str(llm.failed)) if llm.failed else Response()

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/completions")
    async def completions(body: TextBody, request: Request) -> Response:
        known(body.model)
        if not body.prompt:
            raise ValueError(f"prompt={body.prompt!r} is empty: at least one token is needed")
        one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
        prompts: Any = [body.prompt] if one else body.prompt
        return await respond(TEXT, request, body, prompts, body.params())

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        known(body.model)
        if body.top_logprobs and not body.logprobs:
            raise ValueError(f"top_logprobs={body.top_logprobs} without logprobs: use logprobs=true")
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        params = body.params(
            max_tokens=llm.llm.options.max_model_len if limit is None else limit,
            logprobs=body.top_logprobs if body.logprobs else None,
        )
        prompt = llm.llm.chat_prompt([message.plain() for message in body.messages])
        return await respond(CHAT, request, body, [prompt], params)

    async def respond(
        style: Style, request: Request, body: Sampled, prompts: list[Prompt], params: SamplingParams
    ) -> Response:
        n, k = params.n, params.logprobs
        tokenizer = None if k is None else llm.llm.tokenizer

        def logprobs(output: CompletionOutput, start: int) -> dict[str, Any] | None:
            return None if k is None else style.logprobs(tokenizer, output, start, k)

        outputs = _together([metrics.watch(llm.generate(prompt, params), n) for prompt in prompts])
        head = style.head(name, body.stream)
        if body.stream:
            # What can't be served is known before the first token, and a status can still be sent.
            first = await _unless_gone(request, _first(outputs))
            events = _events(style, head, first, outputs, n, logprobs, body.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        last = await _unless_gone(request, _last(outputs))
        choices = [
            {"index": number * n + each.index, **style.whole(each.text), "logprobs": logprobs(each, 0),
             "finish_reason": each.finish_reason}
            for number, output in sorted(last.items()) for each in output.outputs
        ]  # fmt: skip
        return JSONResponse(head | {"choices": choices, "usage": usage(last)})

    answers: dict[type[Exception], Callable[[Any], Response]] = {
        RequestValidationError: lambda error: _error(400, explain(error)),
        ValueError: lambda error: _error(400, str(error)),
        RankError: lambda error: _error(503, str(error)),
        AnyHTTPException: lambda error: _error(error.status_code, str(error.detail)),
        _Gone: lambda error: Response(status_code=499),  # nobody reads it
    }
    for kind, answer in answers.items():
        app.add_exception_handler(kind, partial(_answer, answer))
    return app


async def _answer(answer: Callable[[Any], Response], request: Request, error: Exception) -> Response:
    return answer(error)


def _error(status: int, message: str) -> Response:
    return JSONResponse(error_body(status, message), status)


async def _together(requests: list[Outputs]) -> Numbered:
    """What comes of several requests, with their numbers, as it comes. Left early, all of them are."""
    news: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue()

    async def follow(number: int, outputs: Outputs) -> None:
        try:
            async for output in outputs:
                news.put_nowait((number, output))
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.create_task(follow(number, outputs)) for number, outputs in enumerate(requests)]
    going = len(tasks)
    try:
        while going:
            what = await news.get()
            if isinstance(what, Exception):
                raise what
            going -= what[1].finished
            yield what
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first(outputs: Numbered) -> tuple[int, RequestOutput]:
    return await anext(outputs)


async def _last(outputs: Numbered) -> dict[int, RequestOutput]:
    return {number: output async for number, output in outputs}


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. If the client goes away before, cancels it and raises _Gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _events(
    style: Style, head: dict[str, Any], first: tuple[int, RequestOutput], rest: Numbered, n: int,
    logprobs: Callable[[CompletionOutput, int], dict[str, Any] | None], with_usage: bool,
) -> AsyncGenerator[str, None]:  # fmt: skip
    """The stream: a piece whenever an output has new tokens, also where they make no text yet."""
    latest: dict[int, RequestOutput] = {}
    shown: dict[int, CompletionOutput] = {}  # by index of the choice
    news: tuple[int, RequestOutput] | None = first
    async with aclosing(rest):
        try:
            while news:
                number, latest[number] = news
                for each in latest[number].outputs:
                    index = number * n + each.index
                    before = shown.get(index, CompletionOutput(0, "", [], None))
                    count = len(before.token_ids)
                    if len(each.token_ids) > count or each.finish_reason != before.finish_reason:
                        piece = style.piece(each.text[len(before.text) :], index not in shown)
                        choice = {"index": index, **piece, "logprobs": logprobs(each, count)}
                        choice["finish_reason"] = each.finish_reason
                        shown[index] = each
                        yield _event(head | {"choices": [choice]})
                news = await anext(rest, None)
            if with_usage:
                yield _event(head | {"choices": [], "usage": usage(latest)})
            yield "data: [DONE]\n\n"
        except RankError as error:
            yield _event(error_body(503, str(error)))


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields)}\n\n"


class _Server(uvicorn.Server):
    """On its way out it first ends the engine, so that every request gets an answer: that there will be none."""

    def __init__(self, llm: AsyncLLM) -> None:
        config = uvicorn.Config(
            application(llm), lifespan="off", log_level="warning", timeout_graceful_shutdown=GOODBYE
        )
        super().__init__(config)
        self.llm = llm

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.llm.close()
        await super().shutdown(sockets)


def run(
    model: str, *, host: str = "127.0.0.1", port: int = 8000, ready: Callable[[str, LLM], None], **options: Any
) -> None:
    """Serves `model` until SIGTERM or Ctrl-C; then nothing of it is left.

    Args:
        host, port: where; port 0 takes a free one. ready(url, llm): called when requests can come. options: `LLM`'s.

    Raises OSError where the port is taken, and what `LLM` raises.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))  # a port that is taken is known before anything is loaded
        llm = AsyncLLM(model, **options)
        try:
            if llm.llm.model.folder:
                llm.llm.tokenizer  # noqa: B018  (takes a second, which no request shall wait for)
            listener.listen(1024)
            at = f"[{host}]" if ":" in host else host
            ready(f"http://{at}:{listener.getsockname()[1]}", llm.llm)
            _Server(llm).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            llm.close()
