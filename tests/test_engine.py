"""The scheduler's promises for any requests, and the debug mode that notices ranks which disagree."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import Layout, SamplingParams, run
from labkit.comm import Comm
from labkit.engine.core import Engine, EngineOptions
from labkit.engine.requests import Request
from labkit.engine.scheduler import Scheduler
from labkit.launch.local import RankError
from labkit.model.config import ModelConfig
from labkit.model.find import Model
from labkit.split import even


def request(index: int, prompt: int, tokens: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    return Request(index, [index % 7] * prompt, params, seed=0, stop_ids=frozenset({99}), max_tokens=tokens)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), min_size=1, max_size=25),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 40),
    st.data(),
)
def test_every_request_is_served_whatever_the_lanes_slots_and_ends(
    sizes: list, lanes: int, slots: int, max_prefill: int, data: st.DataObject
) -> None:
    requests = [request(i, *size) for i, size in enumerate(sizes)]
    scheduler = Scheduler(list(requests), lanes, slots, max_prefill)
    first_prefills: list[int] = []
    for tick in range(10_000):
        if scheduler.done:
            break
        lane = tick % lanes
        step = scheduler.next_step(lane)
        if step is None:
            continue
        assert len(set(step.slots)) == len(step.slots) <= slots
        assert all(lane * slots <= slot < (lane + 1) * slots for slot in step.slots)
        prompt_tokens = sum(len(t) for t in step.tokens)
        if step.prefill:
            first_prefills += [r.index for r in step.requests]
            assert prompt_tokens <= max_prefill or len(step.requests) == 1
        else:
            assert prompt_tokens == len(step.requests)
        assert step.positions == [len(r.prompt_ids) + len(r.output_ids) for r in step.requests]
        ends = data.draw(st.integers(0, len(step.requests) - 1)) if tick % 5 == 0 else None
        scheduler.commit(lane, step, [99 if i == ends else 1 for i in range(len(step.requests))])
    assert scheduler.done
    assert first_prefills == list(range(len(requests))), "first come, first served"
    assert all(r.finish_reason for r in requests)
    assert all(len(r.output_ids) == r.max_tokens or r.output_ids[-1] == 99 for r in requests)


def test_lanes_share_the_requests_evenly() -> None:
    scheduler = Scheduler([request(i, 3, 4) for i in range(7)], lanes=3, slots=16, max_prefill=1000)
    steps = [scheduler.next_step(lane) for lane in range(3)]
    assert [len(step.requests) for step in steps if step] == [len(share) for share in even(7, 3)]


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
