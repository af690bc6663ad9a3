"""Timed runs of the engine: medians and spread over repeats, never a single figure."""

import time
from statistics import median
from typing import Any

import torch

from labkit.engine.llm import LLM
from labkit.engine.requests import SamplingParams


def decode(
    model: str, *, dtype: str = "auto", tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False, batch: int = 1,
    prompt: int = 32, tokens: int = 64, repeats: int = 5, threads: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Serves `batch` prompts of `prompt` tokens, `tokens` generated for each, `repeats` times after a warm-up.

    Returns the report (`LLM.report`) of the median run, with `batch`, `prompt_tokens`, `new_tokens`, `repeats`, the TPOT of all
    runs (`tpot_ms_all`, sorted) and `weights_gb_per_s`: bytes of weights read per decode step over the median TPOT, in
    GB/s on all ranks together. Compare it with the machine's memory bandwidth: batch 1 decode is bound by it.
    """
    if min(batch, prompt, repeats) < 1 or tokens < 2:
        raise ValueError(
            f"batch={batch}, prompt={prompt}, repeats={repeats}: use 1 or more; tokens={tokens}: 2 or more"
        )
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    with LLM(
        model, tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp, enable_expert_parallel=ep,
        dtype=dtype, max_model_len=prompt + tokens, max_num_seqs=batch, threads=threads,
    ) as llm:  # fmt: skip
        vocab = llm.model.config.vocab
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, vocab, (batch, prompt), generator=generator).tolist()
        runs = []
        for _ in range(repeats + 1):
            llm.generate(prompts, params)
            runs.append(llm.report())
    runs = sorted(runs[1:], key=lambda r: r["tpot_ms"])
    row = runs[(len(runs) - 1) // 2]
    return {
        **row,
        "model": model,
        "batch": batch,
        "prompt_tokens": prompt,
        "new_tokens": tokens,
        "repeats": repeats,
        "tpot_ms_all": [r["tpot_ms"] for r in runs],
        "weights_gb_per_s": sum(r["weights_bytes"] for r in row["ranks"]) / row["tpot_ms"] / 1e6,
    }


def memory_bandwidth(threads: int = 1, megabytes: int = 256, repeats: int = 7) -> float:
    """GB/s at which `threads` threads of this process read memory: the median of summing a tensor that no cache holds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.ones(megabytes * 250_000)  # float32: 4 bytes each
        seconds = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            x.sum()
            seconds.append(time.perf_counter() - began)
        return x.numel() * 4 / median(seconds[1:]) / 1e9
    finally:
        torch.set_num_threads(before)
