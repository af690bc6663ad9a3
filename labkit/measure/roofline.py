"""The roofline of this machine: what its memory and its arithmetic give at most, measured, and the least time that a model's
passes take with that (Williams et al. 2009, doi:10.1145/1498765.1498785)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from labkit.measure.machine import usable_cores
from labkit.mesh import Layout, pick_backend
from labkit.model import kernels
from labkit.predict.cost import Deployment, Engine, Load
from labkit.predict.hardware import Hardware
from labkit.predict.shape import shape_of

# One that loses nothing: no launches, no exchanges.
IDEAL = Engine("roofline", 1.0, 1.0, 0.0, 0.0, 0.0, {}, "all", False, "")
# Numbers in a row of x, and of w, when products are timed: more for a GPU, which takes no time for the others.
PRODUCT = {"cpu": (512, 2048), "cuda": (8192, 8192)}


@dataclass(frozen=True)
class Roof:
    """GB/s of memory and TFLOP/s of matrix products."""

    memory_gb_per_s: float
    tflops: float

    def seconds(
        self, model: str, dtype: str, passes: float, *, tokens: float, sequences: float, kv_tokens: float, pairs: float
    ) -> float:
        """The least time of `passes` through the whole model, alike, if all of this works for each: weights are read in every
        pass (of experts, those that any token is likely to ask for). In all passes together: `tokens`, `sequences` that get
        logits, K and V of `kv_tokens` read, and `pairs` of a query and a key scored."""
        tokens, sequences, kv_tokens, pairs = (n / passes for n in (tokens, sequences, kv_tokens, pairs))
        hw = Hardware("", 1.0, self.memory_gb_per_s, self.tflops * (2 if dtype == "float32" else 1), attained=1.0)
        at = Deployment(shape_of(model), hw, IDEAL, Layout(), Load(dtype=dtype, kv_dtype=dtype))
        return passes * (at.stage(0, tokens, sequences, kv_tokens, pairs).seconds + at.head(sequences).seconds)


def workers(report: Mapping[str, Any]) -> tuple[str, int, str]:
    """What computes together in the layout of a report, for `measure`: threads ("cpu") or GPUs ("cuda"), how many, and the
    dtype."""
    ranks, threads = len(report["ranks"]), report["threads_per_rank"]
    _, device = pick_backend(ranks)
    if device == "cpu":
        return device, min(ranks * threads, usable_cores()), report["dtype"]
    return device, min(ranks, torch.cuda.device_count()), report["dtype"]


def measure(device: str, count: int, dtype: str) -> Roof:
    """What `count` threads of this process reach together, or as many GPUs ("cuda"), if one of them is like the others."""
    if device == "cpu":
        return Roof(memory_bandwidth(count), product_rate(count, dtype))
    return Roof(count * memory_bandwidth(device=device, megabytes=2048), count * product_rate(1, dtype, device))


def memory_bandwidth(threads: int = 1, megabytes: int = 256, repeats: int = 7, device: str = "cpu") -> float:
    """GB/s at which `threads` threads of this process, or a GPU, read memory that no cache holds: the better of two medians, of
    summing it and of multiplying it with one row, as a decode step does with weights. (Processors differ in which they read
    faster.)"""
    x = torch.ones(megabytes * 10**6 // 4096, 2048, dtype=torch.bfloat16, device=device)
    ways = (x.view(torch.float32).sum, partial(kernels.linear, x[:1].clone(), x))
    return x.nbytes / min(_seconds(ways, threads, repeats)) / 1e9


def product_rate(threads: int, dtype: str, device: str = "cpu", repeats: int = 5) -> float:
    """TFLOP/s of a large matrix product in `dtype` by `threads` threads of this process, or by a GPU."""
    rows, width = PRODUCT[device]
    x, w = (torch.ones(n, width, dtype=getattr(torch, dtype), device=device) for n in (rows, width))
    return 2 * rows * width**2 / min(_seconds([partial(kernels.linear, x, w)], threads, repeats)) / 1e12


def _seconds(ways: Sequence[Callable[[], torch.Tensor]], threads: int, repeats: int) -> list[float]:
    """The median time of each call, after one that doesn't count."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        medians = []
        for call in ways:
            seconds = []
            for _ in range(repeats + 1):
                began = time.perf_counter()
                if call().is_cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            medians.append(median(seconds[1:]))
        return medians
    finally:
        torch.set_num_threads(before)
