"""Bad input ends in one clear error, before anything of it reaches the ranks, and what else is being served loses nothing."""

import asyncio
from typing import Any

import pytest
from test_async_llm import engine, last
from test_batching import SHAPE, llm_of, model

from labkit import LLM, SamplingParams
from labkit.engine.requests import RequestOutput

__all__ = ["SHAPE", "model"]  # a fixture
NAN, INF = float("nan"), float("inf")
WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 1.5, "2", True, None, 10**9],
    "temperature": [-1, NAN, INF, "warm", None, [1], True, 1j],
    "top_p": [0, -0.5, 1.01, NAN, "all", None],
    "top_k": [-2, 1.5, NAN, "3", None],
    "min_p": [-0.1, 1.1, NAN, None],
    "presence_penalty": [-2.1, 2.1, NAN, "x"],
    "frequency_penalty": [-2.1, 2.1, NAN, None],
    "repetition_penalty": [0, -1, NAN, INF, "x"],
    "seed": [1.5, "x", NAN, [1]],
    "max_tokens": [0, -5, 1.5, None, "16", INF],
    "stop": ["", ["a", ""], 5, [5], b"x", [None]],
    "stop_token_ids": [5, ["a"], [1.5], "12"],
    "logprobs": [-1, 1.5, "all", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_sampling_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}=.*: use "):
        SamplingParams(**{name: value})


PROMPTS: list[tuple[Any, str]] = [
    (None, "a prompt is a string, .* got NoneType"),
    (5, "a prompt is a string, .* got int"),
    (b"bytes", "a prompt is a string, .* got bytes"),
    ([[1, 2.5]], r"a prompt is a string, .* got list with 2.5 in it"),
    ([{"prompt": "x"}], "a prompt is a string, .* got dict"),
    ([], "no prompts: give at least one"),
    ([[]], "prompt 0 is empty"),
    ([[1], [-1]], "prompt 1 has token ids outside 0 to 255"),
    ([[1], [256]], "prompt 1 has token ids outside 0 to 255"),
    ([[10**30]], "prompt 0 has token ids outside 0 to 255"),
    ([[1] * 448], "prompt 0 has 448 tokens; max_model_len=448 leaves no room"),
    ([[1] * 1_000_000], "prompt 0 has 1000000 tokens; max_model_len=448 leaves no room"),
    ("text", "has no tokenizer"),
]


@pytest.fixture(scope="module")
def running(model: str) -> Any:
    with llm_of(model, {"tp": 2}) as llm:
        yield llm


@pytest.mark.parametrize(("prompts", "said"), PROMPTS, ids=[said[:30] for _, said in PROMPTS])
def test_prompts_that_are_none_are_refused_and_the_ranks_go_on(prompts: Any, said: str, running: LLM) -> None:
    pids = running.ranks().pids
    with pytest.raises((ValueError, TypeError), match=said):
        running.generate(prompts)
    running.generate([[1, 2, 3]])
    assert running.ranks().pids == pids


@pytest.mark.parametrize("params", ["greedy", ["greedy"], 5, [SamplingParams()] * 2])
def test_parameters_that_are_none_are_refused(params: Any, running: LLM) -> None:
    with pytest.raises((ValueError, TypeError), match="sampling_params"):
        running.generate([[1]], params)


TEXTS: list[tuple[str, str]] = [
    ("", "prompt 0 is empty"),
    ("half of \ud83d", r"a prompt holds '\\ud83d', half a character, at position 8"),
    ("x" * 1_000_000, "prompt 0 has 250000 tokens; max_model_len=64 leaves no room"),
]


def test_texts_that_are_none_are_refused() -> None:
    with LLM(max_model_len=64) as llm:
        for text, said in TEXTS:
            with pytest.raises(ValueError, match=said):
                llm.generate(text)
        with pytest.raises(ValueError, match="half a character"):
            llm.chat([{"role": "user", "content": "\ud83d"}])
        for messages in ([{"role": "user"}], "hello", []):
            with pytest.raises(ValueError, match=r"chat template"):
                llm.chat(messages)  # type: ignore[arg-type]
        # Extremes that are legal: the likeliest token, and no other.
        [greedy] = llm.generate("Hello", SamplingParams(temperature=0.0, max_tokens=3))
        for extreme in (
            {"temperature": 1e-300},
            {"temperature": 1e-45},
            {"top_p": 1e-300},
            {"top_k": 1},
            {"min_p": 1.0},
        ):
            [seen] = llm.generate("Hello", SamplingParams(**extreme, max_tokens=3))
            assert seen.outputs[0].token_ids == greedy.outputs[0].token_ids, extreme


def test_others_lose_nothing_by_bad_requests_among_them(model: str) -> None:
    good = [[i, i + 1] * 20 for i in range(6)]
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=30, ignore_eos=True)
    bad = [prompts[0] if isinstance(prompts, list) and prompts else prompts for prompts, _ in PROMPTS]
    bad[7] = bad[8] = [256]
    with llm_of(model, {}) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(good, params)]

    async def everyone() -> list[RequestOutput | BaseException]:
        async with engine(model, {"tp": 2}) as llm:
            mixed = [prompt for pair in zip(bad, good * 3, strict=False) for prompt in pair]
            served = (last(llm.generate(prompt, params)) for prompt in mixed)
            return await asyncio.gather(*served, return_exceptions=True)

    results = asyncio.run(everyone())
    refused, served = results[::2], results[1::2]
    assert len(refused) == len(bad) and all(isinstance(error, ValueError | TypeError) for error in refused)
    tokens = [output.outputs[0].token_ids for output in served if isinstance(output, RequestOutput)]
    assert tokens == (expected * 3)[: len(bad)]
