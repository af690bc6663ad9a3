"""Continuous batching on real ranks: whatever else is being served, a request gets what it gets alone."""

import json
import random

import pytest

from labkit import LLM, SamplingParams
from labkit.launch.local import RankError

SHAPE = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0,
}  # fmt: skip
LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"dp": 2}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("shape") / "config.json"
    file.write_text(json.dumps(SHAPE))
    return f"random:{file}"


def llm_of(model: str, degrees: dict[str, int], **options: object) -> LLM:
    names = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "dp": "data_parallel_size"}
    return LLM(model, dtype="float32", max_model_len=448, **{names[k]: v for k, v in degrees.items()}, **options)


def many(sampled: bool) -> tuple[list[list[int]], list[SamplingParams]]:
    """200 requests of 1 to 400 prompt tokens and 1 to 40 new ones."""
    rng = random.Random(7)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 400))] for _ in range(200)]
    kind = {"temperature": 0.8, "top_p": 0.9} if sampled else {"temperature": 0.0}
    return prompts, [
        SamplingParams(**kind, seed=i, max_tokens=rng.randint(1, 40), ignore_eos=True) for i in range(len(prompts))
    ]


@pytest.fixture(scope="module", params=[False, True], ids=["greedy", "sampled"])
def alone(request: pytest.FixtureRequest, model: str) -> tuple[list, list, list]:
    """Prompts, parameters, and the tokens of each request served by itself, one after the other."""
    prompts, params = many(request.param)
    with llm_of(model, {}, max_num_seqs=1) as llm:
        outputs = llm.generate(prompts, params)
    return prompts, params, [o.outputs[0].token_ids for o in outputs]


# Room for a third of what 24 sequences may need: requests wait for blocks, and some give theirs up.
@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()) or "one rank")
def test_200_requests_get_what_each_gets_alone(degrees: dict, model: str, alone: tuple) -> None:
    prompts, params, expected = alone
    options = {"max_num_seqs": 24, "max_num_batched_tokens": 128, "kv_cache_tokens": 24 * 150, "debug": True}
    with llm_of(model, degrees, **options) as llm:
        outputs = llm.generate(prompts, params)
        report = llm.report()
    different = [i for i, o in enumerate(outputs) if o.outputs[0].token_ids != expected[i]]
    assert not different
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    for rank in report["ranks"]:
        assert rank["preemptions"] > 0
        assert rank["kv_bytes"] < 24 * 150 * 1.1 * 2 * 4 * 2 * 12 * 4  # K and V, layers, heads, head size, bytes


def test_several_outputs_for_a_prompt_are_those_of_seeds_that_follow_each_other(model: str) -> None:
    prompt = [3, 1, 4, 1, 5]
    with llm_of(model, {"tp": 2}) as llm:
        [several] = llm.generate(prompt, SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True))
        singles = llm.generate(
            [prompt] * 3, [SamplingParams(seed=5 + i, max_tokens=8, ignore_eos=True) for i in range(3)]
        )
    assert [o.index for o in several.outputs] == [0, 1, 2]
    assert [o.token_ids for o in several.outputs] == [o.outputs[0].token_ids for o in singles]
    assert len({tuple(o.token_ids) for o in several.outputs}) == 3


@pytest.mark.parametrize("degrees", [{}, {"tp": 3}, {"tp": 2, "pp": 2}, {"dp": 2}], ids=str)
def test_logprobs_are_those_of_the_model_before_temperature_and_penalties(degrees: dict, model: str) -> None:
    """The same in every layout; each row adds up; the greedy token is the likeliest."""
    prompts = [[5, 6, 7, 8], [9, 10], [11]]
    params = [
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=0.7, frequency_penalty=1.5, seed=3, max_tokens=6, ignore_eos=True, logprobs=256),
    ]
    with llm_of(model, {}) as llm:
        expected = [o.outputs[0] for o in llm.generate(prompts, params)]
    with llm_of(model, degrees) as llm:
        greedy, without, sampled = (o.outputs[0] for o in llm.generate(prompts, params))
    assert without.logprobs is None and without.cumulative_logprob is None
    for got, wanted in ((greedy, expected[0]), (sampled, expected[2])):
        assert got.token_ids == wanted.token_ids
        for seen, right in zip(got.logprobs, wanted.logprobs, strict=True):
            assert seen == pytest.approx(right, abs=1e-4)
    assert [max(row, key=row.get) for row in greedy.logprobs] == greedy.token_ids
    assert all(len(row) == 3 for row in greedy.logprobs)
    for row in sampled.logprobs:  # the whole vocabulary
        assert sum(2.718281828459045**value for value in row.values()) == pytest.approx(1, abs=1e-3)


def test_stop_strings_end_the_output_before_them_and_streams_never_show_them() -> None:
    prompt = "Count: one, two, three, four,"
    with LLM(dtype="float32", max_model_len=128) as llm:
        whole = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=24))[0].outputs[0]
        stop = whole.text[9:13]  # inside the text, across tokens
        params = SamplingParams(temperature=0.0, max_tokens=24, stop=["never there", stop])
        cut = llm.generate(prompt, params)[0].outputs[0]
        streamed = list(llm.stream(prompt, params))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < len(whole.token_ids)
    assert "".join(streamed) == cut.text


def test_metrics_tell_waiting_from_computing(model: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with llm_of(model, {}, max_num_seqs=1) as llm:
        first, second = (o.metrics for o in llm.generate([[1, 2, 3]] * 2, params))
    assert first.queue_s < first.ttft_s <= second.queue_s < second.ttft_s  # the second waits until the first has ended
    assert first.tpot_s and first.tokens_per_s == pytest.approx(20 / (first.ttft_s + 19 * first.tpot_s))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop="x"), "has no tokenizer: stop='x'"),
        (SamplingParams(logprobs=300), "logprobs=300: use at most 256"),
    ],
)
def test_what_the_model_cannot_give_is_refused(params: SamplingParams, message: str, model: str) -> None:
    with llm_of(model, {}) as llm, pytest.raises(ValueError, match=message):
        llm.generate([[1]], params)


def test_a_cache_too_small_for_one_sequence_is_refused(model: str) -> None:
    with pytest.raises(RankError, match="room for 112 tokens, max_model_len=448 needs 448"):
        llm_of(model, {"tp": 2}, kv_cache_tokens=100)
