"""A script: interrupts (SIGINT) at random moments of an engine's life. Says what was not as before, or "all well"."""

import contextlib
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time

import psutil

from labkit import LLM, SamplingParams


def life(model: str) -> list[list[int]]:
    with LLM(model, tensor_parallel_size=2, dtype="float32", max_model_len=128) as llm:
        outputs = llm.generate([[1, 2, 3]] * 3, SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
    return [output.outputs[0].token_ids for output in outputs]


def belongings(me: psutil.Process) -> tuple[object, ...]:
    gc.collect()
    ranks = [rank.pid for server in me.children() for rank in server.children()]
    return me.num_fds(), me.num_threads(), ranks, os.listdir(tempfile.gettempdir())


def main(model: str, moments: int, folder: str) -> None:
    tempfile.tempdir = folder
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's background has it ignored
    right, me, rng = life(model), psutil.Process(), random.Random(1)
    began = time.perf_counter()
    life(model)
    span, before = time.perf_counter() - began, belongings(me)
    interrupted = 0
    for _ in range(moments):
        over = threading.Event()

        def strike(delay: float, over: threading.Event) -> None:
            if not over.wait(delay):
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=strike, args=(rng.uniform(0, span), over))
        thread.start()
        try:
            life(model)
        except KeyboardInterrupt:
            interrupted += 1
        with contextlib.suppress(KeyboardInterrupt):  # it may come this late
            over.set()
            thread.join()
        thread.join()
        deadline = time.monotonic() + 5  # ended threads and processes are gone a little later
        while (after := belongings(me)) != before and time.monotonic() < deadline:
            time.sleep(0.05)
        if after != before:
            sys.exit(f"before {before}, after {after}")
        if life(model) != right:
            sys.exit("other tokens than before")
    print(f"interrupted {interrupted}, all well")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
