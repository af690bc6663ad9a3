"""Steps cut into parts, exchanges that go on beside the work, and the trace that shows it; on real ranks."""

import itertools
import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit import LLM, SamplingParams, run
from labkit.comm import Comm, Exchange, Forward
from labkit.measure.trace import chrome, spans
from labkit.mesh import Layout
from labkit.parallel import overlap

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    decode=st.booleans(),
    mode=st.sampled_from(overlap.MODES),
)
def test_parts_hold_each_token_once_in_order(lengths: list[int], decode: bool, mode: str) -> None:
    lengths = [1] * len(lengths) if decode else lengths
    starts = [7 * decode] * len(lengths)
    slots = [[i] for i in range(10, 10 + len(lengths))]
    parts = overlap.cut([[0] * n for n in lengths], starts, slots, [True] * len(lengths), mode)
    assert len(parts) == 2 if mode == "two-batch" and len(lengths) > 1 else len(parts) <= 2
    seen: dict[int, list[int]] = {}
    for part in parts:
        assert part.sequences
        for i, piece, start, slot, end in zip(
            part.sequences, part.pieces, part.starts, part.tables, part.ends, strict=True
        ):
            assert (start, slot) == (starts[i] + piece.start, slots[i])
            seen.setdefault(i, []).extend(piece)
            assert end == (piece.stop == lengths[i])
    assert seen == {i: list(range(n)) for i, n in enumerate(lengths)}


def steps(comm: Comm, log: list[str], name: str) -> Forward:
    """Two exchanges, each of a tensor that says whose and when."""
    x = torch.full((100,), float(comm.rank + 1))
    for i in range(2):
        log.append(f"{name}{i}")
        x = yield Exchange("all_reduce", x, "tp", "mlp")
    return x


def test_parts_take_turns_and_each_gets_its_own_result() -> None:
    def both(comm: Comm) -> tuple:
        log: list[str] = []
        a, b = overlap.in_turns(comm, [steps(comm, log, "a"), steps(comm, log, "b")])
        alone = overlap.alone(comm, steps(comm, [], "a"))
        [tally] = comm.tallies.values()
        return log, a[0].item(), b[0].item(), alone[0].item(), tally.calls, tally.payload_bytes

    for shared_memory in (True, False):
        for result in run(both, 2, shared_memory=shared_memory):
            assert result == (["a0", "b0", "a1", "b1"], 6.0, 6.0, 6.0, 6, 6 * 400)


def test_what_goes_on_beside_the_work_is_counted_as_hidden() -> None:
    def sleeper(comm: Comm) -> tuple[float, float]:
        pending = comm.all_reduce_start(torch.zeros(4_000_000), what="mlp")
        time.sleep(1.0)
        pending.wait()
        [tally] = comm.tallies.values()
        return tally.hidden_seconds, tally.seconds

    for hidden, exposed in run(sleeper, 2, shared_memory=False):
        assert 0 < hidden < 1.0 and exposed < 0.9  # it took a while, less than the nap, and was not waited for


def test_overlapped_runs_generate_the_same_tokens(questions_and_answers: tuple) -> None:
    prompts, expected = questions_and_answers
    for mode in ("chunks", "two-batch"):
        with LLM(
            tensor_parallel_size=2, dtype="float32", overlap=mode, shared_memory=False, max_model_len=256, trace=True
        ) as llm:
            outputs = llm.generate(prompts, PARAMS)
            report = llm.report()
            trace = spans(llm.trace(), llm.layout)
        assert [o.outputs[0].token_ids for o in outputs] == [ids[:12] for ids in expected]
        prefill = {c["what"]: c for c in report["comm"] if c["phase"] == "prefill"}
        tokens = sum(map(len, prompts))
        for what in ("attention", "mlp"):  # two parts: twice the calls, the same bytes
            assert round(prefill[what]["calls_per_token"] * tokens) == 60
            assert round(prefill[what]["payload_bytes_per_token"]) == 30 * 576 * 4
            assert prefill[what]["hidden_ms_per_token"] > 0
        flights = [s for s in trace if s.flight and s.name == "prefill all_reduce mlp"]
        assert len(flights) == 2 * 60
        working = [s for s in trace if s.kind == "compute" and s.rank == 0]
        beside = [f for f in flights if f.rank == 0 if any(w.began < f.ended and f.began < w.ended for w in working)]
        assert len(beside) > 30


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap='both': use 'none', 'chunks', 'two-batch'"):
        LLM("random:smollm2-135m", overlap="both")


# -- traces --------------------------------------------------------------------------------------------------------------


def test_a_trace_tells_waiting_from_moving_data() -> None:
    def late(comm: Comm) -> list:
        comm.events = []
        comm.all_reduce(torch.zeros(10), "tp", "mlp")
        if comm.rank == 1:
            time.sleep(0.3)
        comm.all_reduce(torch.zeros(10), "tp", "mlp")
        return comm.events

    trace = spans(run(late, 2), Layout(tp=2))
    waited = {rank: sum(s.ended - s.began for s in trace if s.rank == rank and s.kind == "waiting") for rank in (0, 1)}
    worked = {rank: sum(s.ended - s.began for s in trace if s.rank == rank and s.kind == "compute") for rank in (0, 1)}
    assert waited[0] >= 0.25 > waited[1]
    assert worked[1] >= 0.3 > worked[0]


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=["tp2", "pp2"])
def test_a_trace_of_a_run_has_no_gap_and_opens_in_perfetto(layout: Layout) -> None:
    with LLM(
        tensor_parallel_size=layout.tp, pipeline_parallel_size=layout.pp, dtype="float32", max_model_len=64, trace=True
    ) as llm:
        llm.generate([[1, 2, 3], [4, 5]], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
        trace = spans(llm.trace(), layout)
    for rank in (0, 1):
        row = [s for s in trace if s.rank == rank and not s.flight]
        assert all(a.ended == pytest.approx(b.began, abs=1e-9) for a, b in itertools.pairwise(row))
        kinds = {s.kind for s in row}
        assert {"compute", "tp" if layout.tp == 2 else "pp"} <= kinds <= {"compute", "waiting", "bubble", "tp", "pp"}
    if layout.pp == 2:  # the second stage has nothing to do until the first has passed something on
        first = [next(s for s in trace if s.rank == rank and not s.flight) for rank in (0, 1)]
        assert [s.kind for s in first] == ["compute", "bubble"]
        assert first[0].ended > first[1].ended / 2  # both from when the second stage began to wait
    opened = json.loads(json.dumps(chrome(trace)))["traceEvents"]
    slices = [e for e in opened if e["ph"] == "X"]
    assert len(slices) == len(trace) and all(e["dur"] >= 0 and e["ts"] >= 0 for e in slices)
    assert {e["args"]["name"] for e in opened if e["name"] == "process_name"} == {"rank 0", "rank 1"}


def test_without_trace_there_is_none() -> None:
    with LLM("random:smollm2-135m", max_model_len=16) as llm, pytest.raises(ValueError, match="trace=True"):
        llm.trace()
