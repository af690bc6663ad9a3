"""Pipeline stages on real ranks: bubbles as the formulas have them, and what `labkit bench pipeline` compares."""

import json
import sys

import pytest
from test_batching import SHAPE

from labkit import LLM, SamplingParams
from labkit.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("shape") / "config.json"
    file.write_text(json.dumps(SHAPE))
    return f"random:{file}"


@pytest.mark.parametrize("pp", [2, 4])
def test_the_bubble_is_what_the_formulas_say(model: str, pp: int) -> None:
    """Counted on ticks: of one pass of m micro-batches, and of a long decode with m requests in flight."""
    step = 16  # tokens of a prompt, and of a step: each prompt is a micro-batch
    with LLM(
        model, pipeline_parallel_size=pp, dtype="float32", threads=1, max_model_len=96, max_num_batched_tokens=step
    ) as llm:

        def bubble(requests: int, tokens: int) -> float:
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            llm.generate([[i] * step for i in range(requests)], params)
            report = llm.report()
            assert {rank["bubble_fraction"] for rank in report["ranks"]} == {report["bubble_fraction"]}
            return report["bubble_fraction"]

        for m in range(1, 9):
            assert bubble(m, 1) == pytest.approx((pp - 1) / (m + pp - 1), abs=0.05), f"prefill, {m} micro-batches"
            assert bubble(m, 80) == pytest.approx(1 - min(1, m / pp), abs=0.05), f"decode, {m} requests"


def test_bench_pipeline_compares_with_one_rank_under_five_loads(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--batch", "2", "--prompt", "8", "--step", "8", "--tokens", "6", "--repeats", "1", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["labkit", "bench", "pipeline", "--model", model, *sizes, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert [one["load"] for one, _ in pairs] == [
        "1 in flight", "2 in flight", "2 per stage", "16 in flight", "prefill of 2"
    ]  # fmt: skip
    assert [(one["batch"], many["batch"]) for one, many in pairs] == [(1, 1), (2, 2), (2, 4), (16, 16), (2, 2)]
    assert all((one["layout"]["pp"], many["layout"]["pp"]) == (1, 2) for one, many in pairs)
    assert all(row["same_tokens"] and row["throughput"] > 0 for row in rows)
    for row in rows:  # what was served is what the row says
        assert row["ranks"][0]["prompt_tokens"] == row["batch"] * row["prompt_tokens"]
    for one, many in pairs:
        assert one["gain"] == 1 and one["bubble_fraction"] == 0
        assert many["gain"] == pytest.approx(many["throughput"] / one["throughput"])
        assert one["threads_per_rank"] == many["threads_per_rank"]
    # Six turns of one lane out of two; of both lanes, a turn more until the last stage is done; two micro-batches.
    bubbles = [1 - 6 / 12, *[1 - 12 / 13] * 3, 1 - 2 / 3]
    assert [many["bubble_fraction"] for _, many in pairs] == pytest.approx(bubbles)
    assert pairs[0][1]["throughput"] == pytest.approx(1e3 / pairs[0][1]["tpot_ms"])
    assert pairs[-1][1]["throughput"] == pytest.approx(2 * 8 / pairs[-1][1]["seconds"])
