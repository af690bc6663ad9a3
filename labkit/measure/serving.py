"""A server under load: requests that arrive at random, streamed, at several rates; what their users wait for.

The load is open: requests come when they come, whether earlier ones are answered or not, and their times count from when they
were due. It knows HTTP alone, so it also loads a server of another kind that speaks OpenAI's API (vLLM's, say). Client and
server share this machine's cores.
"""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from typing import IO

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from labkit.measure import roofline
from labkit.measure.bench import Row

FRACTIONS = (0.25, 0.5, 0.75, 0.9, 1.1)  # of the capacity: the rates by default
Job = tuple[list[int], int]


@dataclass(frozen=True)
class Work:
    """What is asked for: requests of so many tokens, the fewest and the most; each length is as likely, ids are random."""

    prompt: tuple[int, int]
    output: tuple[int, int]
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in {"prompt": self.prompt, "output": self.output}.items():
            if not 1 <= low <= high:
                raise ValueError(f"{name}={low}-{high}: use a range of tokens, such as 16-64")

    def jobs(self, count: int) -> Iterator[Job]:
        """(prompt ids, tokens to generate) of each request, the same ones whenever it is called."""
        rng = random.Random(self.seed)
        for _ in range(count):
            yield [rng.randrange(32, 96) for _ in range(rng.randint(*self.prompt))], rng.randint(*self.output)


@dataclass(frozen=True)
class Served:
    """One request's times, in seconds from the start of the load: when it was due, and when each piece of its stream came."""

    due: float
    pieces: list[float]
    prompt_tokens: int
    tokens: int

    @property
    def ttft(self) -> float:
        return self.pieces[0] - self.due

    @property
    def total(self) -> float:
        return self.pieces[-1] - self.due

    @property
    def tpot(self) -> float | None:
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Server:
    """A server process, where it listens, and the file with what it says to stderr."""

    url: str
    process: subprocess.Popen[str]
    said: IO[str]


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[Server]:
    """`labkit serve` with these arguments in a process of its own at a free port, from when it can serve to the block's end.

    Raises ValueError or OSError with its message if it can't start.
    """
    command = [sys.executable, "-m", "labkit", "serve", "--port", "0", *arguments, "--json"]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        assert process.stdout, "stdout is a pipe"
        try:
            if not (line := process.stdout.readline()):
                said.seek(0)
                message = said.read().strip().removeprefix("labkit: ")
                raise (ValueError if process.wait() == 2 else OSError)(f"labkit serve {' '.join(arguments)}: {message}")
            yield Server(json.loads(line)["url"], process, said)
        finally:
            process.terminate()


def serve(
    model: str, *, dtype: str = "auto", tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False, threads: int | None = None,
    max_num_seqs: int = 16, url: str = "", rates: Sequence[float] = (), fractions: Sequence[float] = FRACTIONS,
    seconds: float = 20, prompt: tuple[int, int] = (16, 128), output: tuple[int, int] = (16, 64), seed: int = 0,
) -> list[Row]:  # fmt: skip
    """Loads a server of its own, or the one at `url`, at each of `rates` (requests per second) in turn.

    Args:
        rates: by default these `fractions` of the capacity, which is measured first, with as many clients as the server takes
            sequences, none of which pauses.
        seconds: so long requests come at each rate, at random (Poisson). prompt, output: fewest and most tokens of each.

    Returns a row for each rate: `rate`, that offered; `requests`, how many came; `achieved_per_s`, these over the time until the
    last one's end, and `tokens_per_s`, generated (both lag a little behind at any rate: the last ones must end); of `ttft`,
    `tpot`, `itl` (between pieces of a stream) and `e2e` the median as `ttft_ms`, and `ttft_p95_ms`, `ttft_p99_ms`; `queue_ms`,
    the mean wait until a request was first computed, and `preemptions`, both by the server's /metrics; `capacity_per_s`, where
    it was measured; `roofline_share`, of a server of its own: the least time that its steps would take with the memory and
    arithmetic of its cores or GPUs, measured behind each load, over the time until the last request's end (small for a server
    that waits for requests); the work, and what the server says of itself. Above capacity the queue grows as long as requests
    come, so figures depend on `seconds`.

    Raises ValueError or OSError where the server can't start or doesn't answer.
    """
    work = Work(prompt, output, seed)
    if not all(number > 0 for number in (*rates, *fractions, seconds)):
        raise ValueError(f"rates={list(rates)}, fractions={list(fractions)}, seconds={seconds}: use numbers above 0")
    arguments = ["--model", model, "--dtype", dtype, "--tp", str(tp), "--pp", str(pp), "--dp", str(dp)]
    arguments += ["--max-num-seqs", str(max_num_seqs), "--max-model-len", str(prompt[1] + output[1])]
    arguments += ["--ep"] * ep + (["--threads", str(threads)] if threads else [])
    with contextlib.nullcontext() if url else server(*arguments) as own:
        sweep = _sweep(own.url if own else url, model if own else None, work, list(rates), fractions, seconds)
        # In a thread of its own, since a notebook's has an event loop already.
        return ThreadPoolExecutor(1).submit(asyncio.run, sweep).result()


async def _sweep(
    url: str, own: str | None, work: Work, rates: list[float], fractions: Sequence[float], seconds: float
) -> list[Row]:
    """own: the model of a server that `serve` has started."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        try:
            card = (await client.get("/v1/models")).raise_for_status().json()["data"][0]
            layout = card.get("layout", {})
            clients = card.get("max_num_seqs", 16) * layout.get("dp", 1)
            await _busy(client, card["id"], replace(work, output=(2, 2)), 2, 2)  # to warm up
            capacity = None
            if not rates:
                capacity = await _busy(client, card["id"], work, clients, 3 * clients)
                rates = [fraction * capacity for fraction in fractions]
            rows = []
            for rate in rates:
                before = await _counters(client)
                served = await _load(client, card["id"], work, rate, seconds)
                after = await _counters(client)
                said = {
                    key: card.get(key) for key in ("backend", "dtype", "threads_per_rank", "oversubscribed", "link")
                }
                rows.append({
                    "name": " x ".join(f"{k.upper()}={v}" for k, v in layout.items() if v > 1) or ("one rank" if layout else url),
                    "model": card["id"], "layout": layout, "hardware": card.get("hardware", url), **said,
                    "ranks": card.get("ranks", []), "comm": [], "bubble_fraction": None, "batch": clients,
                    "prompt_tokens": list(work.prompt), "new_tokens": list(work.output), "requests": len(served),
                    "rate": rate, "capacity_per_s": capacity, **_figures(served), **_waits(before, after),
                    "roofline_share": _share(own, card, served, before, after) if own else None,
                })  # fmt: skip
            return rows
        except httpx.HTTPError as error:
            raise OSError(f"{url}: {error or type(error).__name__}") from error


async def _ask(client: httpx.AsyncClient, model: str, job: Job, began: float, due: float) -> Served:
    """Sends a request, now, and listens to its stream. `began`: the clock at the start of the load."""
    prompt, tokens = job
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    pieces, count = [], 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise OSError(f"{client.base_url}: {answer.status_code}, {(await answer.aread()).decode()[:500]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise OSError(f"{client.base_url}: {data['error']['message']}")
            if data["choices"]:
                pieces.append(time.perf_counter() - began)
            else:
                count = data["usage"]["completion_tokens"]
    return Served(due, pieces, len(prompt), count)


async def _load(client: httpx.AsyncClient, model: str, work: Work, rate: float, seconds: float) -> list[Served]:
    """Requests as they come for so long, but one at least; the same ones, in the same rhythm, at any rate."""
    rng = random.Random(work.seed)
    came = accumulate(iter(lambda: rng.expovariate(1) / rate, None))
    due = list(takewhile(lambda at: at < seconds, came)) or [0.0]
    began = time.perf_counter()

    async def one(job: Job, at: float) -> Served:
        await asyncio.sleep(at + began - time.perf_counter())
        return await _ask(client, model, job, began, at)

    return await asyncio.gather(*map(one, work.jobs(len(due)), due))


async def _busy(client: httpx.AsyncClient, model: str, work: Work, clients: int, requests: int) -> float:
    """Requests per second that so many clients get which never pause: by the tokens that came before the last one was sent."""
    began = time.perf_counter()
    jobs = work.jobs(requests)
    served: list[Served] = []

    async def one() -> None:
        for job in jobs:
            served.append(await _ask(client, model, job, began, time.perf_counter() - began))

    await asyncio.gather(*(one() for _ in range(clients)))
    last = max(each.due for each in served)
    done = sum(each.tokens * sum(at <= last for at in each.pieces) / len(each.pieces) for each in served)
    return done / last * len(served) / sum(each.tokens for each in served)


async def _counters(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's metrics by name without prefix, all labels together; none, if it has none."""
    answer = await client.get("/metrics")
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text) if answer.status_code == 200 else ():
        for sample in family.samples:
            name = sample.name.split(":")[-1]
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums


def _figures(served: list[Served]) -> Row:
    seconds = max(each.pieces[-1] for each in served)
    times = {
        "ttft": [each.ttft for each in served],
        "tpot": [each.tpot for each in served if each.tpot is not None],
        "itl": [b - a for each in served for a, b in pairwise(each.pieces)],
        "e2e": [each.total for each in served],
    }
    row: Row = {"achieved_per_s": len(served) / seconds, "tokens_per_s": sum(each.tokens for each in served) / seconds}
    for name, values in times.items():
        for field, percent in ((f"{name}_ms", 50), (f"{name}_p95_ms", 95), (f"{name}_p99_ms", 99)):
            row[field] = float(np.percentile(values, percent)) * 1e3 if values else None
    return row


def _waits(before: dict[str, float], after: dict[str, float]) -> Row:
    new = {name: value - before.get(name, 0.0) for name, value in after.items()}
    count = new.get("request_queue_time_seconds_count")
    waited = new["request_queue_time_seconds_sum"] / count * 1e3 if count else None
    return {"queue_ms": waited, "preemptions": new.get("num_preemptions_total")}


def _share(model: str, card: Row, served: Sequence[Served], before: dict[str, float], after: dict[str, float]) -> float:
    steps = after["engine_steps_total"] - before["engine_steps_total"]
    if card["layout"]["ep"] > 1:
        steps /= card["layout"]["dp"]  # which take each step together
    kv = sum(each.tokens * (each.prompt_tokens + each.tokens / 2) for each in served)
    least = roofline.measure(*roofline.workers(card)).seconds(
        model, card["dtype"], steps, tokens=sum(each.prompt_tokens + each.tokens for each in served),
        sequences=sum(each.tokens for each in served), kv_tokens=kv,
        pairs=kv + sum(each.prompt_tokens**2 / 2 for each in served),
    )  # fmt: skip
    return least / max(each.pieces[-1] for each in served)
