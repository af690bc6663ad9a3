"""What must hold for any sizes and degrees: of the scheduler, of the ring all-reduce, of experts and their exchanges."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit import Layout, SamplingParams
from labkit.comm import Comm
from labkit.engine.blocks import BlockPool
from labkit.engine.requests import Request
from labkit.engine.scheduler import Scheduler, Step
from labkit.launch.local import RankGroup
from labkit.mesh import Alone
from labkit.model.checkpoint import RandomWeights, fill
from labkit.model.config import ModelConfig
from labkit.parallel import overlap
from labkit.parallel.all_reduce import ALGORITHMS
from labkit.parallel.expert import EXCHANGES, MoE, Spread

# -- the scheduler -------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """lanes ... caching: the scheduler's and its pool's. requests: by tick of arrival, their prompts' lengths and how many tokens
    they want. aborted: by tick, a request."""

    lanes: int
    sequences: int
    blocks: int
    size: int
    budget: int
    caching: bool
    requests: list[tuple[int, int, int]]
    aborted: dict[int, int]


@st.composite
def work(draw: st.DrawFn) -> Work:
    size = draw(st.integers(1, 8))
    requests = draw(
        st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=12)
    )
    longest = max(-(-(prompt + wanted) // size) for _, prompt, wanted in requests)
    return Work(
        lanes=draw(st.integers(1, 4)), sequences=draw(st.integers(1, 6)), size=size,
        blocks=longest + draw(st.integers(0, 2 * longest)), budget=draw(st.integers(1, 50)), requests=requests,
        caching=draw(st.booleans()),
        aborted=draw(st.dictionaries(st.integers(0, 40), st.integers(0, len(requests) - 1), max_size=3)),
    )  # fmt: skip


def token(request: int, position: int) -> int:
    """Of three texts, which several requests have."""
    return (request % 3 * 1009 + position * 31) % 997


def check_blocks(scheduler: Scheduler) -> None:
    """Every block is free, known and nobody's, or those requests' that it counts."""
    pool = scheduler.pool
    admitted = [*scheduler.filling, *(request for lane in scheduler.running for request in lane)]
    held = [block for request in admitted for block in request.blocks]
    assert sorted([*set(held), *pool.free, *pool.kept]) == list(range(pool.blocks))
    assert pool.users == [held.count(block) for block in range(pool.blocks)]
    assert pool.prefix_caching or (not pool.kept and len(held) == len(set(held)))
    assert len(admitted) <= scheduler.sequences
    assert not any(request.blocks or request.computed for request in scheduler.waiting)


@settings(max_examples=300, deadline=None)
@given(work())
def test_any_work_is_scheduled_whole_in_order_and_alike_everywhere(w: Work) -> None:
    requests = [
        Request(i, [token(i, p) for p in range(length)], SamplingParams(), 0, frozenset(), wanted)
        for i, (_, length, wanted) in enumerate(w.requests)
    ]
    scheduler, twin = (
        Scheduler(lanes=w.lanes, sequences=w.sequences, pool=BlockPool(w.blocks, w.size, w.caching), budget=w.budget)
        for _ in range(2)
    )
    arrivals = sorted(requests, key=lambda request: w.requests[request.index][0])
    twins = {request.index: copy.deepcopy(request) for request in requests}
    flying: dict[int, tuple[Step, Step]] = {}
    tick = 0
    while arrivals or flying or not scheduler.done:
        # Each tick brings a request's next token or a piece of a prompt, unless blocks were taken back: far fewer are enough.
        assert tick < 20_000, "some request never ends"
        while arrivals and w.requests[arrivals[0].index][0] <= tick:
            scheduler.add([request := arrivals.pop(0)])
            twin.add([twins[request.index]])
        if tick in w.aborted:
            scheduler.abort({w.aborted[tick]})
            twin.abort({w.aborted[tick]})
        lane = tick % w.lanes
        if lane in flying:
            for one, step in zip((scheduler, twin), flying.pop(lane), strict=True):
                one.commit(lane, step, [token(r.index, len(r.tokens)) for r in step.sampled])
        check_blocks(scheduler)
        before = {request.index: request.computed for request in requests}
        step, other = scheduler.next_step(lane), twin.next_step(lane)
        check_blocks(scheduler)
        if step and other:
            plans = [(s.tokens, s.starts, s.tables, s.ends, [r.index for r in s.requests]) for s in (step, other)]
            assert plans[0] == plans[1]
            assert sum(map(len, step.tokens)) <= max(w.budget, len(scheduler.running[lane]))
            for request, ids, start, table in zip(step.requests, step.tokens, step.starts, step.tables, strict=True):
                assert ids and ids == request.tokens[start : start + len(ids)]
                assert start in (before[request.index], 0) or (w.caching and start % w.size == 0)
                assert len(table) * w.size >= start + len(ids)
            sampling = [r.index for s, _ in flying.values() for r in s.sampled if not r.aborted]
            assert not {r.index for r in step.requests} & set(sampling), "its last token is not known yet"
            flying[lane] = step, other
        else:
            assert step is other is None
        tick += 1
    assert scheduler.pool.room == w.blocks
    for request in requests:
        if not request.aborted and request.index not in w.aborted.values():
            assert request.output_ids == [
                token(request.index, len(request.prompt_ids) + i) for i in range(request.max_tokens)
            ]


# -- between ranks: they stay, and each example is one message -----------------------------------------------------------


def answer(comm: Comm, channel: Any) -> None:
    while True:
        try:
            case = channel.receive()
        except EOFError:
            return
        channel.send(case(comm))


def ask(group: RankGroup, case: Any) -> list[Any]:
    group.send(case)
    answers = dict(group.receive(30) for _ in range(group.ranks))
    return [answers[rank] for rank in range(group.ranks)]


@pytest.fixture(scope="module", params=[2, 3, 4])
def ring_of(request: pytest.FixtureRequest) -> Iterator[RankGroup]:
    with RankGroup(answer, request.param) as group:
        yield group


def operand(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def summed(comm: Comm, algorithm: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return ALGORITHMS[algorithm](operand(shape, dtype, seed + comm.rank), comm)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    algorithm=st.sampled_from(sorted(ALGORITHMS)),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]),
    seed=st.integers(0, 2**30),
)
def test_an_all_reduce_written_out_adds_up_any_tensor(
    algorithm: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, ring_of: RankGroup
) -> None:
    right = sum(operand(shape, dtype, seed + rank) for rank in range(ring_of.ranks))
    for got in ask(ring_of, partial(summed, algorithm=algorithm, shape=shape, dtype=dtype, seed=seed)):
        assert got.dtype == dtype and torch.equal(got, right)  # whole numbers: exact in any order


LAYOUTS = [
    Layout(tp=2, expert_parallel=True),
    Layout(dp=3, expert_parallel=True),
    Layout(tp=2, dp=2, expert_parallel=True),
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout.tp}-dp{layout.dp}")
def experts_of(request: pytest.FixtureRequest) -> Iterator[tuple[Layout, RankGroup]]:
    with RankGroup(answer, request.param.world, layout=request.param) as group:
        yield request.param, group


def shape_of(experts: int, per_token: int) -> ModelConfig:
    return ModelConfig.from_dict({
        "model_type": "qwen3_moe", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "moe_intermediate_size": 4, "num_experts": experts, "num_experts_per_tok": per_token,
    })  # fmt: skip


@torch.inference_mode()
def exchanged(comm: Comm, config: ModelConfig, spread: Spread, tokens: list[int], seed: int) -> torch.Tensor:
    """What the experts make of a replica's tokens. With a mesh of one rank: of all the replicas' together."""
    assert config.moe
    block = MoE(config, config.moe, 0, comm, spread, torch.float32, torch.device("cpu"))
    fill(block.parameters(), RandomWeights(seed, std=0.5))
    replicas = [operand((n, config.hidden), torch.float32, seed + r) / 50 for r, n in enumerate(tokens)]
    alone = isinstance(comm.mesh, Alone)
    x = torch.cat(replicas) if alone else replicas[comm.mesh.dp_rank]
    return overlap.alone(comm, block(x, [len(x)] if alone else tokens))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_experts_on_any_ranks_make_the_same_of_any_tokens(
    data: st.DataObject, experts_of: tuple[Layout, RankGroup]
) -> None:
    layout, group = experts_of
    experts = data.draw(st.integers(layout.ep, 9))
    config = shape_of(experts, data.draw(st.integers(1, experts)))
    order = data.draw(st.permutations(range(experts)))
    cuts = sorted(data.draw(st.sets(st.integers(1, experts - 1), min_size=layout.ep - 1, max_size=layout.ep - 1)))
    placed = [sorted(order[a:b]) for a, b in zip([0, *cuts], [*cuts, experts], strict=True)]
    tokens = data.draw(st.lists(st.integers(0, 7), min_size=layout.dp, max_size=layout.dp).filter(any))
    exchange, seed = data.draw(st.sampled_from(EXCHANGES)), data.draw(st.integers(0, 2**30))
    right = exchanged(Comm(Alone()), config, Spread(), tokens, seed).split(tokens)
    case = partial(exchanged, config=config, spread=Spread(exchange, {0: placed}), tokens=tokens, seed=seed)
    for rank, got in enumerate(ask(group, case)):
        torch.testing.assert_close(got, right[layout.place(rank)["dp"]], atol=1e-5, rtol=1e-4)
