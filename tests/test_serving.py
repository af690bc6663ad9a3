"""The real model, served over real ranks: the tokens of transformers in every layout, and what is counted on the way."""

import os
import signal
import time

import psutil
import pytest

from labkit import LLM, SamplingParams
from labkit.launch.local import RankError
from labkit.mesh import Layout
from labkit.model.shapes import SHAPES

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
LAYOUTS = [{"tp": t} for t in (1, 2, 3, 4)] + [{"pp": p} for p in (2, 3, 4)]
LAYOUTS += [{"tp": 2, "pp": 2}, {"tp": 2, "pp": 4}, {"dp": 2}]


def llm_of(layout: Layout, **options: object) -> LLM:
    return LLM(
        tensor_parallel_size=layout.tp, pipeline_parallel_size=layout.pp, data_parallel_size=layout.dp,
        max_model_len=256, **options,
    )  # fmt: skip


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()))
def test_greedy_tokens_are_those_of_transformers(degrees: dict, questions_and_answers: tuple) -> None:
    prompts, expected = questions_and_answers
    layout = Layout(**degrees)
    with llm_of(layout, dtype="float32") as llm:
        outputs = llm.generate(prompts, GREEDY)
        report = llm.report()
    assert [o.outputs[0].token_ids for o in outputs] == expected
    layers = SHAPES["smollm2-135m"]["num_hidden_layers"]
    if layout.pp == layout.dp == 1 and layout.tp > 1:  # prompts decode together, so one call serves four tokens
        decode = {c["what"]: c["calls_per_token"] * 4 for c in report["comm"] if c["phase"] == "decode"}
        assert decode == {"attention": layers, "mlp": layers, "embedding": 1, "logits": 1}
    for rank in report["ranks"]:  # float32 from a bfloat16 file: half the bytes
        assert rank["bytes_read"] * 2 <= 1.05 * rank["weights_bytes"]


def test_a_rank_reads_only_its_own_bytes_and_two_all_reduces_per_layer() -> None:
    with llm_of(Layout(tp=2), dtype="bfloat16") as llm:
        llm.generate("The tide", SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
        report = llm.report()
    for rank in report["ranks"]:
        assert 0 < rank["bytes_read"] <= 1.05 * rank["weights_bytes"]
    # 134,515,008 parameters of 2 bytes; norms and KV head 1 are on both ranks
    assert sum(r["weights_bytes"] for r in report["ranks"]) < 1.05 * 134_515_008 * 2
    decode = {(c["op"], c["what"]): c for c in report["comm"] if c["phase"] == "decode"}
    calls = {key: c["calls_per_token"] for key, c in decode.items()}
    assert calls == {
        ("all_reduce", "attention"): 30,
        ("all_reduce", "mlp"): 30,
        ("all_reduce", "embedding"): 1,
        ("all_gather", "logits"): 1,
    }
    # One row of 576 bfloat16 numbers; a ring of two sends each rank's payload once: 2 (n - 1) / n = 1.
    assert decode["all_reduce", "mlp"]["payload_bytes_per_token"] == 30 * 576 * 2
    assert decode["all_reduce", "mlp"]["wire_bytes_per_token"] == 30 * 576 * 2


def test_sampling_is_seeded_and_does_not_depend_on_the_layout(questions_and_answers: tuple) -> None:
    prompts, _ = questions_and_answers
    params = [
        SamplingParams(temperature=0.8, max_tokens=12, seed=7),
        SamplingParams(temperature=1.5, top_p=0.9, top_k=3, max_tokens=12, seed=7),
        SamplingParams(temperature=0.0, max_tokens=12),
    ]
    seen = []
    for layout in (Layout(), Layout(tp=2), Layout(pp=2)):
        with llm_of(layout, dtype="float32") as llm:
            seen.append([o.outputs[0].token_ids for o in llm.generate([prompts[1]] * 3, params)])
    assert seen[0] == seen[1] == seen[2]
    assert len({tuple(ids) for ids in seen[0]}) == 3, "noise or its restriction changed nothing"


def test_more_requests_than_slots_are_all_served_and_streaming_gives_the_same_text() -> None:
    prompts = [f"{n} plus one is" for n in range(7)]
    params = SamplingParams(temperature=0.0, max_tokens=8)
    with llm_of(Layout(pp=2), max_num_seqs=3, dtype="float32") as llm:
        texts = [o.outputs[0].text for o in llm.generate(prompts, params)]
        alone = [llm.generate(p, params)[0].outputs[0].text for p in prompts]
        streamed = "".join(llm.stream(prompts[3], params))
    assert texts == alone
    assert streamed == texts[3]


def test_chat_answers_through_the_template() -> None:
    with LLM() as llm:
        answer = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(temperature=0.0, max_tokens=32),
        )
    assert "Paris" in answer[0].outputs[0].text
    assert answer[0].outputs[0].finish_reason == "stop"


def test_a_killed_rank_is_named_within_five_seconds_and_the_next_call_works() -> None:
    with llm_of(Layout(tp=2)) as llm:
        expected = llm.generate("The tide", GREEDY)[0].outputs[0].token_ids
        pids = [r["pid"] for r in llm.report()["ranks"]]
        stream = llm.stream("The tide", SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
        next(stream)
        os.kill(pids[1], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(RankError, match="rank 1 .*SIGKILL"):
            list(stream)
        assert time.monotonic() - killed < 5
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        assert llm.generate("The tide", GREEDY)[0].outputs[0].token_ids == expected
