"""`make soak`: faults strike running engines at random moments, from outside. It counts what must not be, and prints a table.

Each fault strikes a random rank (an interrupt: the caller) somewhere between the start of an engine and its end, in a random
layout, with `LLM` or `AsyncLLM`, with and without restart=True. Then: does it end in time? Are the tokens right, or is there
an error? Is a rank, a file, a thread left? Does the next engine work?
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from test_async_llm import engine, last
from test_batching import LAYOUTS, SHAPE, llm_of

from labkit import SamplingParams
from labkit.launch.local import RankError

FAULTS = {
    "killed": (signal.SIGKILL, 5.0, 30),  # what, seconds until the error, how often among 100
    "crashed": (signal.SIGSEGV, 5.0, 25),
    "terminated": (signal.SIGTERM, 5.0, 15),
    "interrupted": (signal.SIGINT, 5.0, 25),
    "stopped": (signal.SIGSTOP, 15.0, 5),
}
PROMPTS = [[i, i + 1, i + 2] * 10 for i in range(8)]
PARAMS = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=8 + 5 * i, ignore_eos=True) for i in range(8)]
OPTIONS = {"max_num_batched_tokens": 64, "max_num_seqs": 6}


def serve(model: str, degrees: dict[str, int], restart: bool, live: bool) -> list[list[int] | None]:
    """Tokens of each request. None: it got an error."""
    if not live:
        with llm_of(model, degrees, restart=restart, **OPTIONS) as llm:
            return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]

    async def one(llm: Any, i: int) -> list[int] | None:
        await asyncio.sleep(0.02 * i)
        try:
            return (await last(llm.generate(PROMPTS[i], PARAMS[i]))).outputs[0].token_ids
        except RankError:
            return None

    async def all_of_them() -> list[list[int] | None]:
        async with engine(model, degrees, restart=restart, **OPTIONS) as llm:
            return await asyncio.gather(*(one(llm, i) for i in range(len(PROMPTS))))

    return asyncio.run(all_of_them())


class Striker(threading.Thread):
    """Strikes after `delay` seconds, once there is a rank, unless all is `over` by then. `struck`: when it did."""

    def __init__(self, what: signal.Signals, delay: float, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.what, self.delay, self.rng = what, delay, rng
        self.over, self.struck = threading.Event(), 0.0

    def run(self) -> None:
        self.over.wait(self.delay)
        while not self.over.is_set():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if victims := [os.getpid()] if self.what == signal.SIGINT else ranks():
                    self.struck = time.monotonic()
                    os.kill(self.rng.choice(victims), self.what)
                    return
            self.over.wait(0.001)


def ranks() -> list[int]:
    return [
        rank.pid for server in psutil.Process().children() for rank in server.children() if rank.status() != "zombie"
    ]


def belongings() -> tuple[Any, ...]:
    gc.collect()
    me = psutil.Process()
    return (
        me.num_fds(),
        me.num_threads(),
        os.listdir(tempfile.gettempdir()),
        {p.name for p in Path("/dev/shm").iterdir()},
    )


def main(faults: int, seed: int, seconds: float) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(SHAPE))
        model = f"random:{config}"
        right = serve(model, {}, False, False)
        for live in (False, True):
            serve(model, {"tp": 2}, False, live)
        began = time.monotonic()
        serve(model, {"tp": 2}, False, True)
        span = time.monotonic() - began
        tempfile.tempdir = str(Path(folder) / "tmp")
        Path(tempfile.tempdir).mkdir()
        before, memory = belongings(), psutil.Process().memory_info().rss
        rows: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}
        slowest = dict.fromkeys(FAULTS, 0.0)
        number = 0
        began = time.monotonic()
        while number < faults and time.monotonic() - began < seconds:
            name = rng.choices(list(FAULTS), [often for _, _, often in FAULTS.values()])[0]
            what, limit, _ = FAULTS[name]
            degrees, restart, live = rng.choice(LAYOUTS), rng.random() < 0.5, rng.random() < 0.5
            striker, row = Striker(what, rng.uniform(0, span), rng), rows[name]
            results: list[list[int] | None] = []
            striker.start()
            try:
                results = serve(model, degrees, restart, live)
                how = "all served" if None not in results else "error"
            except RankError:
                how = "error"
            except KeyboardInterrupt:
                how = "interrupt"
            with contextlib.suppress(KeyboardInterrupt):
                striker.over.set()
                striker.join()
            striker.join()
            if not striker.struck:
                continue
            number += 1
            took = time.monotonic() - striker.struck
            slowest[name] = max(slowest[name], took)
            row["faults"] += 1
            row[how] += 1
            row["late"] += took > limit + 10 * (how == "all served")  # after a restart there is still something to do
            row["wrong tokens"] += any(got not in (None, wanted) for got, wanted in zip(results, right, strict=False))
            row["ranks left"] += len(ranks())
            row["other things left"] += belongings() != before
            row["next one fails"] += serve(model, degrees, False, False) != right
            print(f"\r{number} of {faults}", end="", file=sys.stderr)
        grown = (psutil.Process().memory_info().rss - memory) / 1e6
    good, bad = ("faults", "all served", "error", "interrupt"), (
        "late", "wrong tokens", "ranks left", "other things left", "next one fails",
    )  # fmt: skip
    print(f"\n{'':12}" + "".join(f"{column:>19}" for column in (*good, *bad, "slowest, s")))
    for name, row in rows.items():
        print(f"{name:12}" + "".join(f"{row[column]:19}" for column in (*good, *bad)) + f"{slowest[name]:19.1f}")
    print(f"The caller's process has grown by {grown:.1f} MB.")
    if any(row[column] for row in rows.values() for column in bad) or grown > 20:
        sys.exit("not survived as promised")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's background has it ignored
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end earlier")
    main(**vars(parser.parse_args()))
