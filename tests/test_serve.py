"""`labkit serve` as its users meet it: a server process with real ranks, OpenAI's own client, and clients that misbehave."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from labkit import LLM, SamplingParams
from labkit.engine.requests import RequestOutput
from labkit.measure.serving import Server, server

MODEL = "smollm2-135m"
PROMPTS = [f"A list of {n} things:" for n in range(8)]
IDS = [[504, 13147, 2733], [28, 260, 2240]]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SEEDED = SamplingParams(n=2, temperature=0.8, top_p=0.9, top_k=40, seed=11, max_tokens=12)
STOPPED = SamplingParams(temperature=0.0, max_tokens=40, stop=["three", "four"])
SCORED = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3)
COUNT = "Count: one, two,"
LONG = {"model": MODEL, "prompt": "The tide", "max_tokens": 230, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def right() -> dict[str, RequestOutput]:
    """What LLM says: by prompt, and by the name of a test's parameters."""
    with LLM(dtype="float32", max_model_len=256) as llm:
        outputs = dict(zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True))
        outputs |= dict(zip(("ids 0", "ids 1"), llm.generate(IDS, GREEDY), strict=True))
        for name, params in {"seeded": SEEDED, "stopped": STOPPED, "scored": SCORED}.items():
            [outputs[name]] = llm.generate(COUNT, params)
        [outputs["chat"]] = llm.chat(QUESTION, SamplingParams(temperature=0.0, max_tokens=200))
    return outputs


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    with server("--dtype", "float32", "--tp", "2", "--max-model-len", "256", "--max-num-seqs", "8") as it:
        yield it


@pytest.fixture(scope="module")
def client(served: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def metrics(served: Server) -> dict[str, float]:
    """By name, or name and reason; all must be well-formed."""
    families = text_string_to_metric_families(httpx.get(f"{served.url}/metrics").raise_for_status().text)
    samples = [sample for family in families for sample in family.samples]
    assert all(s.labels["model_name"] == MODEL for s in samples if s.name.startswith("labkit:"))
    return {" ".join([s.name, *s.labels.values()][: 1 + ("finished_reason" in s.labels)]): s.value for s in samples}


def until(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_completions_are_what_generate_gives(client: openai.OpenAI, right: dict) -> None:
    common = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    one = client.completions.create(prompt=PROMPTS[0], **common)
    assert one.object == "text_completion" and one.id.startswith("cmpl-") and one.model == MODEL
    assert [(c.index, c.text, c.finish_reason) for c in one.choices] == [
        (0, right[PROMPTS[0]].outputs[0].text, "length")
    ]
    many = client.completions.create(prompt=PROMPTS, **common)
    assert [c.text for c in many.choices] == [right[p].outputs[0].text for p in PROMPTS]
    assert [c.index for c in many.choices] == list(range(8))
    assert many.usage.prompt_tokens == sum(len(right[p].prompt_token_ids) for p in PROMPTS)
    assert many.usage.completion_tokens == 12 * 8
    assert many.usage.total_tokens == many.usage.prompt_tokens + many.usage.completion_tokens
    ids = client.completions.create(prompt=IDS, **common)
    assert [c.text for c in ids.choices] == [right["ids 0"].outputs[0].text, right["ids 1"].outputs[0].text]
    assert client.completions.create(prompt=IDS[1], **common).choices[0].text == ids.choices[1].text


def test_sampling_parameters_reach_the_engine(client: openai.OpenAI, right: dict) -> None:
    seeded = client.completions.create(
        model=MODEL, prompt=COUNT, n=2, temperature=0.8, top_p=0.9, seed=11, max_tokens=12, extra_body={"top_k": 40}
    )
    assert [c.text for c in seeded.choices] == [o.text for o in right["seeded"].outputs]
    assert seeded.choices[0].text != seeded.choices[1].text
    stopped = client.completions.create(model=MODEL, prompt=COUNT, temperature=0, max_tokens=40, stop=["three", "four"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (right["stopped"].outputs[0].text, "stop")
    assert stopped.usage.completion_tokens < 40
    token = right[PROMPTS[0]].outputs[0].token_ids[3]
    by_token = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], temperature=0, extra_body={"stop_token_ids": [token], "min_p": 0.1}
    )
    assert by_token.choices[0].finish_reason == "stop" and by_token.usage.completion_tokens == 4
    default = [client.completions.create(model=MODEL, prompt=COUNT) for _ in range(2)]
    assert default[0].usage.completion_tokens == 16 and default[0].choices[0].text != default[1].choices[0].text


def test_log_probabilities(client: openai.OpenAI, right: dict) -> None:
    expected = right["scored"].outputs[0]
    text = client.completions.create(model=MODEL, prompt=COUNT, temperature=0, max_tokens=6, logprobs=3).choices[0]
    own = [each[token] for each, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    assert text.logprobs.token_logprobs == pytest.approx(own, abs=1e-3)
    assert "".join(text.logprobs.tokens) == text.text
    at = text.logprobs.text_offset
    assert [text.text[a:b] for a, b in zip(at, [*at[1:], None], strict=True)] == text.logprobs.tokens
    assert [len(top) for top in text.logprobs.top_logprobs] == [3] * 6
    chat = {
        "model": MODEL,
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**chat).choices[0]
    assert "".join(bytes(t.bytes).decode() for t in whole.logprobs.content) == whole.message.content
    for token in whole.logprobs.content:  # greedy: the chosen one is the likeliest
        assert [token.top_logprobs[0].token, len(token.top_logprobs)] == [token.token, 2]
        assert token.logprob == token.top_logprobs[0].logprob > token.top_logprobs[1].logprob
    streamed = [piece.choices[0].logprobs.content for piece in client.chat.completions.create(stream=True, **chat)]
    assert [t.token for part in streamed for t in part] == [t.token for t in whole.logprobs.content]


def test_chat_goes_through_the_template(client: openai.OpenAI, right: dict) -> None:
    expected = right["chat"].outputs[0].text
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    for messages, limit in ((QUESTION, {}), (parts, {"max_completion_tokens": 200}), (QUESTION, {"max_tokens": 200})):
        answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, **limit)
        message = answer.choices[0].message
        assert (message.role, message.content, answer.choices[0].finish_reason) == ("assistant", expected, "stop")
        assert answer.object == "chat.completion" and answer.usage.prompt_tokens == len(right["chat"].prompt_token_ids)
    # A conversation goes on with what the client library itself makes of the answer.
    more = [*QUESTION, message.model_dump(), {"role": "user", "content": "And of Spain?"}]
    assert client.chat.completions.create(model=MODEL, messages=more, max_tokens=4).usage.prompt_tokens > 40


def test_streams_are_the_same_in_pieces(client: openai.OpenAI, served: Server, right: dict) -> None:
    asked = {
        "model": MODEL,
        "temperature": 0,
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    texts, reasons = dict.fromkeys(range(8), ""), {}
    *pieces, end = client.completions.create(prompt=PROMPTS, **asked)
    for piece in pieces:
        [choice] = piece.choices
        assert choice.index not in reasons, "a piece after the end"
        texts[choice.index] += choice.text
        reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert list(texts.values()) == [right[p].outputs[0].text for p in PROMPTS]
    assert len(pieces) > 40 and set(reasons.values()) == {"length"} and len(reasons) == 8
    assert end.choices == [] and end.usage.completion_tokens == 96
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        deltas = [event.chunk.choices[0].delta for event in stream if event.type == "chunk"]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert stream.get_final_completion().choices[0].message.content == right["chat"].outputs[0].text
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=asked | {"prompt": COUNT, "stop": "three"}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    assert "".join(choice["text"] for choice in choices) == right["stopped"].outputs[0].text
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "said"),
    [
        ("completions", {"model": "gpt-4"}, 404, "model", "use 'smollm2-135m'"),
        ("completions", {"prompt": None}, 400, "prompt", "required"),
        ("completions", {"prompt": 5}, 400, "prompt", "valid string, or Input should be a valid list"),
        ("completions", {"prompt": []}, 400, "prompt", "is empty"),
        ("completions", {"prompt": [49152]}, 400, None, "outside 0 to 49151"),
        ("completions", {"prompt": "a " * 300}, 400, None, "max_model_len=256 leaves no room"),
        ("completions", {"temperature": -1}, 400, "temperature", "a number from 0 (greedy) up"),
        ("completions", {"top_p": 1.5, "stream": True}, 400, "top_p", "up to 1"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens", "1 or more"),
        ("completions", {"n": "3"}, 400, "n", "valid integer"),
        ("completions", {"logprobs": 6}, 400, "logprobs", "less than or equal to 5"),
        ("completions", {"echo": True}, 400, "echo", "not supported"),
        ("completions", {"prompt": [""], "stream": True}, 400, None, "is empty"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages", "'system', 'user' or"),
        ("chat/completions", {"tools": [{}]}, 400, "tools", "not supported"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "logprobs=true"),
    ],
)
def test_what_cannot_be_served_is_refused_as_openai_does(
    served: Server, path: str, body: dict, status: int, param: str | None, said: str
) -> None:
    content = {"messages": QUESTION} if "chat" in path else {"prompt": "a"}
    answer = httpx.post(f"{served.url}/v1/{path}", json={"model": MODEL} | content | body)
    error = answer.json()["error"]
    assert answer.status_code == status and error.keys() == {"message", "type", "param", "code"}
    assert said in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


def test_errors_reach_the_client_library(client: openai.OpenAI, served: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError, match="temperature=3.0: use|temperature=-3.0: use"):
        client.completions.create(model=MODEL, prompt="a", temperature=-3)
    broken = httpx.post(f"{served.url}/v1/completions", content="[1", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and "no JSON object" in broken.json()["error"]["message"]
    assert httpx.get(f"{served.url}/v2").json()["error"]["message"] == "Not Found"


def test_forty_clients_at_once_get_what_each_gets_alone(served: Server, right: dict) -> None:
    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:

            async def one(i: int) -> str:
                asked = {"model": MODEL, "prompt": PROMPTS[i % 8], "temperature": 0, "max_tokens": 12}
                if i % 2:
                    return (await client.completions.create(**asked)).choices[0].text
                return "".join([p.choices[0].text async for p in await client.completions.create(stream=True, **asked)])

            return await asyncio.gather(*map(one, range(40)))

    before = metrics(served)
    assert asyncio.run(everyone()) == [right[PROMPTS[i % 8]].outputs[0].text for i in range(40)]
    after = metrics(served)
    new = {name: after[name] - before.get(name, 0) for name in after}
    assert new["labkit:generation_tokens_total"] == 40 * 12 and new["labkit:request_success_total length"] == 40
    assert new["labkit:prompt_tokens_total"] == 5 * sum(len(right[p].prompt_token_ids) for p in PROMPTS)
    for name in ("time_to_first_token", "request_time_per_output_token", "e2e_request_latency", "request_queue_time"):
        assert new[f"labkit:{name}_seconds_count"] == 40 and new[f"labkit:{name}_seconds_sum"] > 0
    gaps = new["labkit:inter_token_latency_seconds_sum"]  # of all between them, up to what a piece takes to be noted
    assert gaps == pytest.approx(11 * new["labkit:request_time_per_output_token_seconds_sum"], rel=0.1)
    assert new["labkit:request_queue_time_seconds_sum"] > 40 * 0.05, "with eight at a time, most have waited"


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "waiting"])
def test_a_client_that_goes_away_aborts_its_request(client: openai.OpenAI, served: Server, stream: bool) -> None:
    before = metrics(served)
    if stream:
        pieces = client.completions.create(stream=True, **LONG)
        next(pieces)
        assert metrics(served)["labkit:num_requests_running"] == 1
        assert 0 < metrics(served)["labkit:kv_cache_usage_perc"] < 0.5
        pieces.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**LONG)
    until(
        lambda: (
            metrics(served).get("labkit:request_success_total abort", 0)
            > before.get("labkit:request_success_total abort", 0)
        )
    )
    after = metrics(served)
    assert after["labkit:num_requests_running"] == after["labkit:kv_cache_usage_perc"] == 0
    assert after["labkit:generation_tokens_total"] < before["labkit:generation_tokens_total"] + 200
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_models_and_health(client: openai.OpenAI, served: Server) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by, model.object) == (MODEL, "labkit", "model")
    assert model.max_model_len == 256 and model.layout == {"tp": 2, "pp": 1, "dp": 1, "ep": 1}
    assert client.models.retrieve(MODEL) == model
    assert httpx.get(f"{served.url}/health").status_code == 200
    listening = [c.laddr.ip for c in psutil.Process(served.process.pid).net_connections() if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"], "only this machine is let in"


def processes_of(served: Server) -> list[psutil.Process]:
    mine = psutil.Process(served.process.pid)
    return [mine, *mine.children(recursive=True)]


def test_a_rank_that_dies_is_told_to_clients_and_to_who_asks_after_its_health() -> None:
    with server("--model", "tiny-moe", "--tp", "2", "--max-model-len", "256") as it:
        client = openai.OpenAI(base_url=f"{it.url}/v1", api_key="none", max_retries=0, timeout=60)
        everything = processes_of(it)
        pieces = client.completions.create(stream=True, **LONG | {"model": "tiny-moe"})
        next(pieces)
        ranks = httpx.get(f"{it.url}/v1/models").json()["data"][0]["ranks"]
        os.kill(ranks[1]["pid"], signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"rank 1 of 2 was killed by SIGKILL"):
            list(pieces)
        with pytest.raises(openai.InternalServerError, match="SIGKILL") as refused:
            client.completions.create(model="tiny-moe", prompt="a")
        assert refused.value.status_code == 503
        health = httpx.get(f"{it.url}/health")
        assert health.status_code == 503 and "SIGKILL" in health.json()["error"]["message"]
        it.process.send_signal(signal.SIGINT)
        assert it.process.wait(20) == 0
        assert not psutil.wait_procs(everything, 10)[1]


def test_sigterm_ends_a_busy_server_and_leaves_nothing_behind() -> None:
    with server("--model", "tiny-moe", "--dp", "2", "--ep", "--max-model-len", "256") as it:
        everything = processes_of(it)
        assert len(everything) >= 3
        with socket.socket() as other, pytest.raises(OSError):  # and meanwhile nobody else gets the port
            other.bind(("127.0.0.1", int(it.url.rpartition(":")[2])))
        with httpx.stream("POST", f"{it.url}/v1/completions", json={
            "model": "tiny-moe", "prompt": "The tide", "max_tokens": 250, "ignore_eos": True, "stream": True,
        }) as answer:  # fmt: skip
            lines = answer.iter_lines()  # kept: without it the connection would be closed
            next(lines)
            assert 'running{model_name="tiny-moe"} 1.0' in httpx.get(f"{it.url}/metrics").text
            it.process.terminate()
            assert "the engine has been closed" in "".join(lines)
        assert it.process.wait(20) == 0
        assert not psutil.wait_procs(everything, 10)[1]
        it.said.seek(0)
        assert it.said.read() == ""


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=12 does not fit 9 query heads"), server("--tp", "12"):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"), server("--model", "tiny-moe", "--port", port):
            pass
