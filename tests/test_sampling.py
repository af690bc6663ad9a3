"""Sampling from logits spread over ranks: the right distribution, the right restriction, the same ids everywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import Layout, SamplingParams, run
from labkit.comm import Comm
from labkit.engine import sampling
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


def mixed(comm: Comm, logits: torch.Tensor, params: list[SamplingParams]) -> tuple[list[int], list[int]]:
    """Ids drawn from each row of logits (B, n), all at once, and one after the other."""
    head = VocabParallelHead(logits.shape[1], comm)
    part = logits[:, head.rows.start : head.rows.stop]
    requests = [Request(i, [1, 2], p, seed=7 + i, stop_ids=frozenset(), max_tokens=1) for i, p in enumerate(params)]
    at_once = sample(part.clone(), requests, head).tolist()
    return at_once, [sample(part[[i]], [r], head).item() for i, r in enumerate(requests)]  # type: ignore[misc]


def test_a_request_draws_the_same_in_any_company_and_layout() -> None:
    some = [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.0}, {"top_k": -1, "top_p": 0.99}]
    params = [SamplingParams(**{"temperature": 0.9, **p}) for p in some * 3]
    logits = torch.randn(len(params), 3001, generator=torch.Generator().manual_seed(1)) * 2
    results = {layout: run(mixed, layout=layout, args=(logits, params)) for layout in (Layout(), Layout(tp=2, pp=2))}
    expected = results[Layout()][0][1]
    assert all(ids == expected for ranks in results.values() for both in ranks for ids in both)
    greedy = range(4, len(params), 6)
    assert [expected[i] for i in greedy] == logits[greedy].argmax(1).tolist()
    assert len(set(expected)) > 10


LIMITS = st.builds(
    SamplingParams,
    temperature=st.just(1.0),
    top_k=st.sampled_from([-1, 0, 1, 2, 50, 1500, 4999, 5000, 9999]),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)


@given(st.lists(LIMITS, min_size=1, max_size=4), st.sampled_from([0.01, 1.0, 4.0]), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_what_is_left_of_a_large_vocabulary(params: list[SamplingParams], spread: float, seed: int) -> None:
    """From flat rows, of which nearly all is left, to steep ones."""
    scores = torch.randn(len(params), 5000, generator=torch.Generator().manual_seed(seed)) * spread
    values, tokens = sampling._left(scores, params)
    for i, p in enumerate(params):
        row = scores[i].double()
        if p.top_k > 0:
            row = row.masked_fill(row < row.topk(min(p.top_k, 5000)).values[-1], -torch.inf)
        ordered, order = row.softmax(0).sort(descending=True)
        before = ordered.cumsum(0) - ordered
        kept = (before < p.top_p) & (ordered >= p.min_p * ordered[0])
        kept[0] = True
        mine = {token for token, value in zip(tokens[i].tolist(), values[i].tolist(), strict=True) if value > -math.inf}
        odd = mine ^ set(order[kept & (ordered > 0)].tolist())
        places = torch.tensor([order.tolist().index(token) for token in odd], dtype=torch.int64)
        assert ((before[places] - p.top_p).abs() < 1e-5).all()  # where rounding decides
        assert torch.equal(values[i][values[i] > -math.inf], scores[i][tokens[i][values[i] > -math.inf]])


def test_noise_is_gumbels_and_that_of_neighbours_has_nothing_in_common() -> None:
    def noise(seed: int, position: int) -> torch.Tensor:
        scores, request = torch.zeros(1, 40_000), Request(0, [0] * position, SamplingParams(), seed, frozenset(), 1)
        sampling._add_noise(scores, [request], torch.arange(40_000)[None])
        return scores[0].double()

    rows = torch.stack([noise(seed, position) for seed in (0, 1, 2, 2**62) for position in range(1, 26)])
    assert rows.isfinite().all()
    uniform = (-(-rows).exp()).exp()  # of Gumbel's distribution, where each number stands
    counts = (uniform * 1000).long().flatten().bincount(minlength=1000)
    expected = rows.numel() / 1000
    assert ((counts - expected) ** 2 / expected).sum() < 1000 + 5 * 2000**0.5  # chi squared
    normal = (uniform - 0.5) * 12**0.5
    between = torch.corrcoef(normal) - torch.eye(len(rows))  # of different requests and positions
    assert between.abs().max() < 6 / 40_000**0.5
    for distance in (1, 2, 64, 4096):  # of ids
        assert (normal[:, distance:] * normal[:, :-distance]).mean().abs() < 5 / rows.numel() ** 0.5


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
