"""Prefix caching on real ranks: what is not computed again changes no token, and is counted."""

import random

import httpx
import openai
import pytest
import tiny
from prometheus_client.parser import text_string_to_metric_families

from labkit import LLM, Layout, SamplingParams, run
from labkit.comm import Comm
from labkit.engine.core import BLOCK, Engine, EngineOptions
from labkit.engine.requests import Request
from labkit.measure.serving import server
from labkit.model.find import find

LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2}]
NAMES = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "dp": "data_parallel_size"}


def greedy(tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


def ids(output: object) -> list[int]:
    return output.outputs[0].token_ids  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.write("llama", folder)
    return f"random:{folder / 'config.json'}"


def beginnings(vocab: int, longest: int) -> list[list[int]]:
    """60 prompts that begin with one of five texts, or a part of it."""
    rng = random.Random(3)

    def text(length: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(length)]

    systems = [text(longest) for _ in range(5)]
    return [rng.choice(systems)[: rng.randint(1, longest)] + text(rng.randint(0, 20)) for _ in range(60)]


@pytest.fixture(scope="module")
def alone(model: str) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what each gets where nothing is cached."""
    prompts = beginnings(find(model).config.vocab, 100)
    with LLM(model, dtype="float32", max_model_len=128, max_num_seqs=1) as llm:
        return prompts, [ids(output) for output in llm.generate(prompts, greedy(7))]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()) or "one rank")
@pytest.mark.parametrize("room", [8192, 400], ids=["room for all", "preempted"])
def test_shared_beginnings_are_computed_once_and_change_nothing(
    degrees: dict, room: int, model: str, alone: tuple
) -> None:
    prompts, expected = alone
    options = {NAMES[k]: v for k, v in degrees.items()} | {
        "max_model_len": 128, "max_num_seqs": 12, "max_num_batched_tokens": 64, "debug": True, "kv_cache_tokens": room,
    }  # fmt: skip
    with LLM(model, dtype="float32", enable_prefix_caching=True, **options) as llm:
        outputs = llm.generate(prompts, greedy(7))
        first = llm.report()["ranks"]
        again = llm.generate(prompts, greedy(7))
        second = llm.report()["ranks"]
    assert [ids(output) for output in outputs] == expected == [ids(output) for output in again]
    everyone = sum(map(len, prompts))
    heads = [
        rank for rank in range(len(first)) if llm.layout.place(rank) | {"tp": 0, "pp": 0} == llm.layout.place(rank)
    ]
    for ranks, served in ((first, outputs), (second, again)):
        cached = [output.num_cached_tokens for output in served]
        assert all(n % BLOCK == 0 and n < len(p) for n, p in zip(cached, prompts, strict=True))
        assert sum(ranks[rank]["cached_tokens"] for rank in heads) == sum(cached)
        computed = sum(ranks[rank]["prompt_tokens"] for rank in heads)
        # What is found again after a preemption was not computed either.
        assert computed + sum(cached) <= everyone and (room == 400 or computed + sum(cached) == everyone)
    assert sum(first[rank]["cached_tokens"] for rank in heads) > everyone / 4
    assert any(rank["preemptions"] for rank in first) == (room == 400)
    if room == 8192:  # all that is full was still there
        assert [o.num_cached_tokens for o in again] == [(len(p) - 1) // BLOCK * BLOCK for p in prompts]


def test_replicas_that_share_experts_keep_their_own() -> None:
    prompts = beginnings(2048, 60)[:20]
    options = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 4}
    with LLM("tiny-moe", **options) as llm:
        expected = [ids(output) for output in llm.generate(prompts, greedy(5))]
    ep = {"data_parallel_size": 2, "enable_expert_parallel": True, "enable_prefix_caching": True, "debug": True}
    with LLM("tiny-moe", **options, **ep) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, greedy(5))
            assert [ids(output) for output in outputs] == expected
        assert all(rank["cached_tokens"] > 0 for rank in llm.report()["ranks"])


def test_the_prompt_of_several_outputs_is_computed_once(model: str) -> None:
    prompt = list(range(5, 5 + 40))
    sampled = SamplingParams(n=4, seed=1, max_tokens=6, ignore_eos=True)
    with LLM(model, dtype="float32", max_model_len=64) as llm:
        [apart] = llm.generate(prompt, sampled)
        assert llm.report()["ranks"][0]["prompt_tokens"] == 4 * 40
    with LLM(model, dtype="float32", max_model_len=64, enable_prefix_caching=True, tensor_parallel_size=2) as llm:
        [together] = llm.generate(prompt, sampled)
        assert llm.report()["ranks"][0]["prompt_tokens"] == 40 + 3 * 8
    assert [o.token_ids for o in together.outputs] == [o.token_ids for o in apart.outputs]
    assert together.num_cached_tokens == 0


def leave_half_way(comm: Comm, model: str) -> tuple[list[list[int]], list[int]]:
    options = EngineOptions("float32", 64, max_num_seqs=2, max_num_batched_tokens=16, seed=0, prefix_caching=True)
    engine = Engine(find(model), comm, options)
    outputs, cached = [], []
    for steps in (None, 1, None, None):
        request = Request(0, list(range(5, 45)), greedy(4), 0, frozenset(), 4)
        for number, _ in enumerate(going := engine.generate([request]), 1):
            if number == steps:
                going.close()
                break
        outputs.append(request.output_ids)
        cached.append(request.cached)
    return outputs, cached


def test_a_run_that_is_left_half_way_leaves_nothing_to_be_found(model: str) -> None:
    for outputs, cached in run(leave_half_way, layout=Layout(pp=2), args=(model,)):
        assert outputs[0] == outputs[2] == outputs[3] and len(outputs[0]) == 4
        assert cached == [0, 32, 0, 32]


def test_a_conversation_over_http_computes_its_past_once() -> None:
    asked = [
        {"role": "user", "content": "Name three rivers of Europe, and say in a few words where each of them ends."}
    ]
    with server("--dtype", "float32", "--max-model-len", "256", "--enable-prefix-caching") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)

        def ask() -> openai.types.chat.ChatCompletion:
            return client.chat.completions.create(model="smollm2-135m", messages=asked, temperature=0, max_tokens=24)

        first = ask()
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        asked += [first.choices[0].message.model_dump(), {"role": "user", "content": "Which is the longest?"}]
        second = ask()
        metrics = text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
        found = {sample.name: sample.value for family in metrics for sample in family.samples}
    whole = second.usage.prompt_tokens
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - BLOCK < cached < whole
    assert found["labkit:prefix_cache_hits_total"] == cached
    with LLM(dtype="float32", max_model_len=256) as llm:
        [right] = llm.chat(asked, SamplingParams(temperature=0.0, max_tokens=24))
    assert second.choices[0].message.content == right.outputs[0].text and whole == len(right.prompt_token_ids)
