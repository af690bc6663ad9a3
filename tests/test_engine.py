"""The scheduler's promises for any requests, and the debug mode that notices ranks which disagree."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import Layout, SamplingParams, run
from labkit.comm import Comm
from labkit.engine.blocks import BlockPool
from labkit.engine.core import Engine, EngineOptions
from labkit.engine.requests import Request
from labkit.engine.scheduler import Scheduler, Step
from labkit.launch.local import RankError
from labkit.model.config import ModelConfig
from labkit.model.find import Model
from labkit.split import even


def request(index: int, prompt: int, tokens: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    return Request(index, [index % 7] * prompt, params, seed=0, stop_ids=frozenset({99}), max_tokens=tokens)


SIZE = 4  # tokens in a cache block


def scheduler_of(requests: list[Request], *, blocks: int, caching: bool = False, **options: int) -> Scheduler:
    made = Scheduler(pool=BlockPool(blocks, SIZE, caching), **options)
    made.add(requests)
    return made


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), min_size=1, max_size=25),
    lanes=st.integers(1, 4),
    sequences=st.integers(1, 6),
    blocks=st.integers(9, 60),  # 9 hold the longest request
    budget=st.integers(1, 40),
    caching=st.booleans(),
    data=st.data(),
)
def test_every_request_is_served_whatever_lanes_blocks_budget_and_ends(
    sizes: list, lanes: int, sequences: int, blocks: int, budget: int, caching: bool, data: st.DataObject
) -> None:
    requests = [request(i, *size) for i, size in enumerate(sizes)]
    scheduler = scheduler_of(requests, lanes=lanes, sequences=sequences, blocks=blocks, budget=budget, caching=caching)
    cached: dict[int, list[tuple]] = {}  # of each block, the texts that its tokens' K and V are of
    flying: dict[int, tuple[Step, list[int]]] = {}
    arrived: list[int] = []
    for tick in range(20_000):
        lane = tick % lanes
        if lane in flying:
            step, ids = flying.pop(lane)
            scheduler.commit(lane, step, ids)
        if scheduler.done and not flying:
            break
        step = scheduler.next_step(lane)
        if step is None:
            continue
        _check(step, scheduler, cached, budget)
        arrived += sorted(r.index for r in step.requests if r.index not in arrived)
        active = {id(r) for r in scheduler.filling} | {id(r) for running in scheduler.running for r in running}
        assert len(active) <= sequences
        end = data.draw(st.integers(0, len(step.sampled))) if tick % 5 == 0 else None
        # The prompt goes on as it began, so that what one generates is what another comes with.
        flying[lane] = step, [99 if i == end else r.index % 7 for i, r in enumerate(step.sampled)]
    assert scheduler.done
    assert arrived == sorted(arrived), "first come, first served"
    assert all(r.finish_reason for r in requests)
    assert all(len(r.output_ids) == r.max_tokens or r.output_ids[-1] == 99 for r in requests)
    assert all_came_back(scheduler)


def all_came_back(scheduler: Scheduler) -> bool:
    pool = scheduler.pool
    return sorted([*pool.free, *pool.kept]) == list(range(pool.blocks)) and not any(pool.users)


def _check(step: Step, scheduler: Scheduler, cached: dict[int, list[tuple]], budget: int) -> None:
    """Attention of `step` will find the tokens before its own where steps before it have put their K and V, whatever happened
    since; and it writes where nobody else reads."""
    lengths = [len(t) for t in step.tokens]
    running = sum(1 for n, r in zip(lengths, step.requests, strict=True) if n == 1 and r.output_ids)
    assert sum(lengths) <= max(budget, running)
    assert lengths == [n for n in lengths if n == 1] + [n for n in lengths if n > 1], "single tokens first"
    owners = [
        block for r in (*scheduler.filling, *(r for lane in scheduler.running for r in lane)) for block in r.blocks
    ]
    assert scheduler.pool.prefix_caching or len(owners) == len(set(owners)), "no block has two owners"
    assert all(owners.count(block) == users for block, users in enumerate(scheduler.pool.users))
    rows = list(zip(step.requests, step.tokens, step.starts, step.tables, step.ends, strict=True))
    for request, tokens, start, table, end in rows:
        assert tokens == request.tokens[start : start + len(tokens)]
        assert end == (start + len(tokens) == len(request.tokens))
        seen = [cached[table[p // SIZE]][p % SIZE] for p in range(start)]
        assert seen == [tuple(request.tokens[: p + 1]) for p in range(start)]
    for request, tokens, start, table, _ in rows:
        for position in range(start, start + len(tokens)):
            assert owners.count(table[position // SIZE]) == 1
            block = cached.setdefault(table[position // SIZE], [()] * SIZE)
            block[position % SIZE] = tuple(request.tokens[: position + 1])


def test_lanes_share_the_requests_evenly() -> None:
    scheduler = scheduler_of([request(i, 3, 4) for i in range(7)], lanes=3, sequences=16, blocks=99, budget=1000)
    steps = [scheduler.next_step(lane) for lane in range(3)]
    assert [len(step.requests) for step in steps if step] == [len(share) for share in even(7, 3)]


def test_pieces_of_one_prompt_follow_each_other_through_the_lanes_and_share_steps_with_decode() -> None:
    long, short = request(0, 10, 2), request(1, 2, 9)
    scheduler = scheduler_of([long, short], lanes=2, sequences=4, blocks=99, budget=4)
    steps = []
    for tick in range(6):
        step = scheduler.next_step(tick % 2)
        steps.append([(r.index, len(t)) for r, t in zip(step.requests, step.tokens, strict=True)] if step else [])
        if step:
            scheduler.commit(tick % 2, step, [1] * len(step.sampled))
    # Three pieces in three turns, two lanes; behind its end the other prompt, in the lane that has room.
    assert steps[:4] == [[(0, 4)], [(0, 4)], [(0, 2)], [(1, 2)]]
    assert steps[4:] == [[(0, 1)], [(1, 1)]]


def test_when_blocks_run_out_the_youngest_waits_and_loses_nothing() -> None:
    old, young = request(0, 6, 8), request(1, 6, 8)
    scheduler = scheduler_of([old, young], lanes=1, sequences=4, blocks=5, budget=64)
    finished: list[int] = []
    again = 0
    while not scheduler.done:
        step = scheduler.next_step(0)
        assert step
        again += step.recomputed_tokens
        scheduler.commit(0, step, [1] * len(step.sampled))
        finished += [r.index for r in step.sampled if r.finish_reason]
    assert finished == [0, 1]
    assert scheduler.preemptions >= 1 and again >= len(young.prompt_ids)
    assert old.output_ids == young.output_ids == [1] * 8


def test_what_is_aborted_leaves_at_once_wherever_it_is() -> None:
    under_way, filling, waiting, other = (request(i, n, 5) for i, n in enumerate((2, 9, 3, 2)))
    scheduler = scheduler_of([under_way, filling, waiting, other], lanes=1, sequences=2, blocks=9, budget=4)
    step = scheduler.next_step(0)
    assert step and step.requests == [under_way, filling]
    scheduler.abort({0, 1, 2})
    scheduler.commit(0, step, [1] * len(step.sampled))  # its token comes too late
    assert [r.finish_reason for r in (under_way, filling, waiting)] == ["abort"] * 3
    assert not under_way.output_ids
    while not scheduler.done:
        step = scheduler.next_step(0)
        assert step and step.requests == [other]
        scheduler.commit(0, step, [1] * len(step.sampled))
    assert other.output_ids == [1] * 5
    assert all_came_back(scheduler)


def test_a_prompt_that_begins_like_another_computes_only_the_rest() -> None:
    """Waits for the one that is computing the beginning; is never left without a token to compute; shares what was generated."""
    texts = [[7, 7, 7, 7, 8, 8, 8, 8, 9], [7, 7, 7, 7, 8, 8, 8, 8, 1, 2], [7, 7, 7, 7, 8, 8, 8, 8], [7, 7, 7, 1]]
    requests = [
        Request(i, ids, SamplingParams(max_tokens=4), 0, frozenset(), max_tokens=4) for i, ids in enumerate(texts)
    ]
    scheduler = scheduler_of(requests, lanes=1, sequences=4, blocks=9, budget=64, caching=True)
    steps = []
    while not scheduler.done:
        step = scheduler.next_step(0)
        assert step
        steps.append({r.index: len(t) for r, t in zip(step.requests, step.tokens, strict=True)})
        scheduler.commit(0, step, [5] * len(step.sampled))
    assert steps[:2] == [{0: 9}, {0: 1, 1: 2, 2: 4, 3: 4}]
    assert [r.cached for r in requests] == [0, 8, 4, 0]
    again = Request(4, [*texts[0], 5, 5, 5, 5, 6], SamplingParams(), 0, frozenset(), max_tokens=1)
    scheduler.add([again])
    step = scheduler.next_step(0)
    assert (
        step and step.tokens == [[5, 6]] and again.cached == 12
    )  # the last token that was generated was never computed


@pytest.mark.parametrize("caching", [False, True])
def test_what_comes_computed_is_not_computed_again(caching: bool) -> None:
    """A dry run has no cache to fill: it decodes behind a prompt as if it had been computed."""
    ready = Request(0, [7] * 9, SamplingParams(), 0, frozenset(), max_tokens=2, computed=8)
    scheduler = scheduler_of([ready], lanes=1, sequences=4, blocks=9, budget=64, caching=caching)
    step = scheduler.next_step(0)
    assert step and step.tokens == [[7]] and step.starts == [8] and ready.cached == 0


def test_nothing_is_read_in_the_step_that_computes_it() -> None:
    first, second = request(7, 3, 9), request(14, 6, 1)  # the same token again and again
    scheduler = scheduler_of([first], lanes=1, sequences=4, blocks=9, budget=64, caching=True)
    step = scheduler.next_step(0)
    assert step
    scheduler.commit(0, step, [0])
    scheduler.add([second])
    step = scheduler.next_step(0)  # fills up the first block of one request, and begins the other
    assert step and step.tokens == [[0], [0] * 6]


def test_blocks_that_nobody_has_are_forgotten_oldest_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4, SIZE, prefix_caching=True)

    def fill(text: list[int]) -> None:
        found, number = pool.known([*text, 0])
        blocks = pool.take(len(text) // SIZE, found)
        assert blocks
        for at in range(len(found), len(blocks)):
            number = pool.learn(number, blocks[at], text[at * SIZE : (at + 1) * SIZE])
        pool.give_back(blocks)

    def known(text: list[int]) -> int:
        return len(pool.known([*text, 0])[0])

    a, b, c = ([i] * 2 * SIZE for i in range(3))
    fill(a)
    fill(b)
    fill(a)  # b is the one unused for longest now
    fill(c[:SIZE])
    assert (known(a), known(b), known(c)) == (2, 1, 1)
    assert pool.take(5) is None and pool.room == 4
    held = pool.take(2, pool.known([*a, 0])[0])
    assert held and pool.take(3) is None and pool.take(2)  # what is shared is no room for others
    assert (known(a), known(b), known(c)) == (2, 0, 0)


def tiny_model() -> Model:
    shape = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    return Model("random:tiny", ModelConfig.from_dict({**shape, "num_attention_heads": 2}), None)


def serve(comm: Comm, odd_rank: int | None) -> list[list[int]]:
    options = EngineOptions("float32", max_model_len=32, max_num_seqs=4, max_num_batched_tokens=64, seed=0, debug=True)
    engine = Engine(tiny_model(), comm, options)
    requests = [request(i, 3, 5) for i in range(3)]
    if comm.rank == odd_rank:
        requests[1] = replace(requests[1], max_tokens=3)  # as if this rank had decided by its own clock
    for _ in engine.generate(requests):
        pass
    return [r.output_ids for r in requests]


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=["tp2", "pp2"])
def test_debug_names_the_step_in_which_ranks_disagree(layout: Layout) -> None:
    agreed = run(serve, layout=layout, args=(None,))
    assert agreed[0] == agreed[1]
    # The third token of request 1 ends it on rank 1 only; the next plan of its lane differs.
    with pytest.raises(RankError, match=r"tick \d+: rank\(s\) \[1\] planned another step than the rest of \[0, 1\]"):
        run(serve, layout=layout, args=(1,))
