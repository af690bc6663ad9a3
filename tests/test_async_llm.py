"""Requests that come and go while others are served, on real ranks."""

import asyncio
import os
import random
import signal
from itertools import pairwise

import psutil
import pytest
from test_batching import LAYOUTS, SHAPE, llm_of, many, model

from labkit import AsyncLLM, SamplingParams
from labkit.engine.requests import RequestOutput
from labkit.launch.local import RankError

__all__ = ["SHAPE", "model"]  # a fixture
NAMES = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "dp": "data_parallel_size"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def engine(model: str, degrees: dict[str, int], **options: object) -> AsyncLLM:
    names = {NAMES[name]: degree for name, degree in degrees.items()}
    return AsyncLLM(model, dtype="float32", max_model_len=448, **names, **options)


async def last(outputs: object) -> RequestOutput:
    return [output async for output in outputs][-1]  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=[False, True], ids=["greedy", "sampled"])
def alone(request: pytest.FixtureRequest, model: str) -> tuple[list, list, list]:
    """`many`'s 200 requests, and the tokens of each served by itself."""
    prompts, params = many(request.param)
    with llm_of(model, {}, max_num_seqs=1) as llm:
        return prompts, params, [o.outputs[0].token_ids for o in llm.generate(prompts, params)]


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()) or "one rank")
def test_requests_that_arrive_at_random_get_what_each_gets_alone(degrees: dict, model: str, alone: tuple) -> None:
    prompts, params, expected = alone
    rng = random.Random(3)
    options = {"max_num_seqs": 12, "max_num_batched_tokens": 128, "kv_cache_tokens": 12 * 150, "debug": True}

    async def one(llm: AsyncLLM, i: int) -> list[int]:
        await asyncio.sleep(rng.random() * 3)
        return (await last(llm.generate(prompts[i], params[i]))).outputs[0].token_ids

    async def everyone() -> list[list[int]]:
        async with engine(model, degrees, **options) as llm:
            found = await asyncio.gather(*(one(llm, i) for i in range(len(prompts))))
            stats = llm.stats()
        assert stats["running"] == stats["waiting"] == stats["kv_blocks_used"] == 0
        assert stats["generation_tokens"] == sum(map(len, expected))
        assert stats["prompt_tokens"] == sum(map(len, prompts))
        return found

    assert asyncio.run(everyone()) == expected


@pytest.mark.parametrize("degrees", [{}, {"pp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_who_leaves_early_frees_what_it_had(degrees: dict, model: str) -> None:
    async def scene() -> None:
        # Room for one request of its length on each replica.
        async with engine(model, degrees, kv_cache_tokens=448, max_num_seqs=4) as llm:
            long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
            for _ in range(2):  # a replica each, with dp=2
                async for output in llm.generate([1] * 40, long):
                    if len(output.outputs[0].token_ids) >= 3:
                        break
            waiting = [asyncio.ensure_future(last(llm.generate([2] * 40, long, f"named {i}"))) for i in range(2)]
            while llm.stats()["running"] < 1 or len(llm._by_id) < 2:
                await asyncio.sleep(0.01)
            for i in range(2):
                await llm.abort(f"named {i}")
            for aborted in await asyncio.gather(*waiting):
                assert aborted.finished and aborted.outputs[0].finish_reason == "abort"
                assert len(aborted.outputs[0].token_ids) < 400
            await llm.abort("nobody")
            after = await asyncio.gather(*(last(llm.generate([3] * 9, GREEDY)) for _ in range(2)))
            assert [len(o.outputs[0].token_ids) for o in after] == [8, 8]
        assert [rank["preemptions"] for rank in llm.llm.report()["ranks"]] == [0] * llm.llm.layout.world

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_outputs_grow_and_end_as_generate_gives_them() -> None:
    prompt = "Count: one, two, three, four,"
    params = SamplingParams(n=2, temperature=0.7, seed=3, max_tokens=16, stop=["seven"], logprobs=1)

    async def growing() -> list[RequestOutput]:
        async with AsyncLLM(dtype="float32", max_model_len=128) as llm:
            outputs = [o async for o in llm.generate(prompt, params)]
            with pytest.raises(ValueError, match="is empty"):
                await last(llm.generate([], params))
            [whole] = [await last(llm.generate(prompt, params))]
        [right] = llm.llm.generate(prompt, params)
        llm.llm.close()
        assert [o.text for o in whole.outputs] == [o.text for o in right.outputs]
        assert outputs[-1].outputs[0].logprobs and outputs[-1].outputs == right.outputs
        return outputs

    outputs = asyncio.run(growing())
    assert len(outputs) > 8
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    for before, after in pairwise(outputs):
        for a, b in zip(before.outputs, after.outputs, strict=True):
            assert b.text.startswith(a.text) and b.token_ids[: len(a.token_ids)] == a.token_ids
    assert 0 < outputs[-1].metrics.ttft_s < 30 and outputs[-1].metrics.tokens_per_s > 0


def test_a_rank_that_dies_is_told_to_all_who_wait_and_to_all_who_come(model: str) -> None:
    async def scene() -> None:
        llm = engine(model, {"tp": 2})
        waiting = [asyncio.ensure_future(last(llm.generate([i] * 9, SamplingParams(max_tokens=400)))) for i in (1, 2)]
        await asyncio.sleep(0.05)
        os.kill(llm.llm.ranks().pids[1], signal.SIGKILL)
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, RankError) and "rank 1 of 2 was killed by SIGKILL" in str(result)
        with pytest.raises(RankError, match="SIGKILL"):
            await last(llm.generate([1], GREEDY))
        assert isinstance(llm.failed, RankError)
        llm.close()

    asyncio.run(asyncio.wait_for(scene(), 60))


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"pp": 2}], ids=str)
def test_memory_does_not_grow_with_the_requests_served(degrees: dict, model: str) -> None:
    """2,000 requests: from the 500th on nothing is kept, on ranks or in the caller's process."""

    async def scene() -> None:
        async with engine(model, degrees, kv_cache_tokens=1024, max_num_seqs=16) as llm:
            processes = [psutil.Process(pid) for pid in (os.getpid(), *llm.llm.ranks().pids)]
            before: list[int] = []
            for round_number in range(4):
                rng = random.Random(round_number)
                prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(500)]
                await asyncio.gather(*(last(llm.generate(prompt, GREEDY)) for prompt in prompts))
                resident = [process.memory_info().rss for process in processes]
                before = before or resident
            grown = [(now - then) / 1e6 for now, then in zip(resident, before, strict=True)]
            assert max(grown) < 4, f"MB, of the caller and each rank: {grown}"

    asyncio.run(scene())
