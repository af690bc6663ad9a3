"""Sampling from logits spread over ranks: the right distribution, the right restriction, the same ids everywhere."""

import pytest
import torch

from labkit import Layout, SamplingParams, run
from labkit.comm import Comm
from labkit.engine.requests import Request
from labkit.engine.sampling import sample
from labkit.parallel.tensor import VocabParallelHead

VOCAB, DRAWS = 11, 4000


def draws(comm: Comm, logits: torch.Tensor, params: SamplingParams) -> list[int]:
    """One draw from `logits` (VOCAB,) for each of DRAWS requests with seeds of their own."""
    head = VocabParallelHead(VOCAB, comm)
    requests = [Request(i, [1], params, seed=i, stop_ids=frozenset(), max_tokens=1) for i in range(DRAWS)]
    part = logits[head.rows.start : head.rows.stop].repeat(DRAWS, 1)
    return sample(part, requests, head).tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=2.0, top_k=5, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.3),
        SamplingParams(temperature=0.7, top_k=6, top_p=0.9, min_p=0.2),
        SamplingParams(temperature=0.0),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_draws_follow_the_restricted_softmax(params: SamplingParams) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5
    ranks = run(draws, layout=Layout(tp=3, pp=2), args=(logits, params))
    assert all(rank == ranks[0] for rank in ranks)

    if params.temperature == 0:
        assert set(ranks[0]) == {int(logits.argmax())}
        return
    order = logits.argsort(descending=True)
    expected = (logits / params.temperature).softmax(0)
    if params.top_k:
        expected[order[params.top_k :]] = 0
        expected /= expected.sum()
    kept, total = [], 0.0
    for i in order.tolist():  # the likeliest tokens until they reach top_p together
        if total < params.top_p:
            kept.append(i)
            total += float(expected[i])
    expected[[i for i in range(VOCAB) if i not in kept]] = 0
    expected[expected < params.min_p * expected.max()] = 0
    expected /= expected.sum()
    seen = torch.tensor(ranks[0]).bincount(minlength=VOCAB) / DRAWS
    assert not seen[expected == 0].any()
    assert (seen - expected).abs().max() < 0.03  # four standard deviations of a share of 0.5 in 4,000 draws


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -2},
        {"max_tokens": 0},
        {"n": 0},
        {"min_p": 1.5},
        {"logprobs": -1},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"presence_penalty": 3},
        {"repetition_penalty": 0},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*: use"):
        SamplingParams(**wrong)
