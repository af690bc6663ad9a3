"""The planner: it tries every layout, refuses with figures that are the cost model's, and its winners follow from hardware."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from labkit.cli import app
from labkit.predict.commands import commands
from labkit.predict.cost import Load, deployment, predict
from labkit.predict.plan import plan, words


def fitting(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["layouts"] if row["fits"]]


def best(result: dict[str, Any]) -> str:
    return words(result["recommended"]["layout"])


def row_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in result["layouts"] if words(row["layout"]) == name)


def test_405b_on_16_gpus_of_80_gb() -> None:
    result = plan("llama-3.1-405b", "h100-sxm", gpus=16, batch=8, context=4096)
    assert len(result["layouts"]) == 15  # three factors of 16
    for row in result["layouts"]:
        layout = row["layout"]
        at = deployment(
            "llama-3.1-405b",
            "h100-sxm",
            tp=layout["tp"],
            pp=layout["pp"],
            dp=layout["dp"],
            load=Load(batch=8, context=4096, prompt=4096),
        )
        memory = at.memory()
        assert row["memory_gb_per_gpu"] == memory["total_gb"]
        assert (
            row["fits"] == (memory["total_gb"] <= 72) == (layout["dp"] == 1)
        )  # 811.7 GB of weights leave no room for two
        if not row["fits"]:
            for part in ("weights_gb", "total_gb"):
                assert f"{memory[part]:.1f}" in row["reason"]
            assert f"{memory['total_gb'] - 72:.1f} more than the 72.0 usable" in row["reason"]
    assert "101.5 GB of weights" in row_of(result, "tp=8 x dp=2")["reason"]
    assert "all-reduces cross" in row_of(result, "tp=16")["reason"]
    assert "8 KV heads are each held 2 times" in row_of(result, "tp=16")["reason"]
    assert "8 of 16 stages idle" in row_of(result, "pp=16")["reason"]
    assert result["refused"] == 10
    with_nothing = plan("llama-3.1-405b", "h100-sxm", gpus=8)
    assert with_nothing["recommended"] is None and not fitting(with_nothing)


def test_ranking_and_figures_are_the_cost_models() -> None:
    for objective, key in (("latency", "tpot_ms"), ("throughput", "max_tokens_per_s")):
        rows = fitting(plan("llama-3.1-70b", "h100-sxm", gpus=8, batch=16, context=4096, objective=objective))
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=objective == "throughput") and len(values) > 4
        for row in rows:
            degrees = {k: row["layout"][k] for k in ("tp", "pp", "dp")}
            same = predict("llama-3.1-70b", "h100-sxm", **degrees, batch=16, context=4096)
            full = predict("llama-3.1-70b", "h100-sxm", **degrees, batch=row["max_batch"], context=4096)
            assert (row["tpot_ms"], row["ttft_ms"]) == (same["tpot_ms"], same["ttft_ms"])
            assert row["max_tokens_per_s"] == full["tokens_per_s"] and full["memory"]["fits"]
            more = predict(
                "llama-3.1-70b", "h100-sxm", **degrees, batch=row["max_batch"] + degrees["dp"] * 8, context=4096
            )
            assert row["max_batch"] == 1024 * degrees["dp"] or not more["memory"]["fits"]


def test_pareto_front() -> None:
    rows = fitting(plan("llama-3.1-70b", "h200", gpus=8, batch=16, context=2048, dtype="fp8"))
    front = [row for row in rows if row["pareto"]]
    assert 3 <= len(front) < len(rows)
    for row in rows:
        beaten = [r for r in rows if r["tpot_ms"] < row["tpot_ms"] and r["max_tokens_per_s"] > row["max_tokens_per_s"]]
        assert row["pareto"] == (not beaten)


def test_questions_with_known_answers() -> None:
    on_four = plan("llama-2-70b", "a100-80gb,link_gbs=100", gpus=4, batch=8)
    assert best(on_four) == "tp=4"
    assert "mostly for weights" in on_four["recommended"]["reason"]
    assert row_of(on_four, "tp=2 x pp=2")["tpot_ms"] > on_four["recommended"]["tpot_ms"]
    three_ways = [words(row["layout"]) for row in fitting(plan("gpt-3-175b", "a100-80gb", gpus=8, batch=4))]
    assert three_ways == ["tp=8", "tp=4 x pp=2", "tp=2 x pp=4", "pp=8"]
    small = plan("llama-3.2-1b", "h100-sxm", gpus=8, batch=256, objective="throughput")
    assert best(small) == "dp=8"  # it fits on one: nothing to send
    assert "each of 8 replicas reads all weights" in small["recommended"]["reason"]
    # Links as slow as a network's: stages send one tensor for each token, tensor-parallel ranks two for each layer.
    slow = plan("llama-2-70b", "a100-80gb,link=pcie,link_gbs=1", gpus=4, batch=64, objective="throughput")
    assert "pp" in best(slow) and row_of(slow, "tp=4")["max_tokens_per_s"] < slow["recommended"]["max_tokens_per_s"]
    assert "of the time is exchanges (1 GB/s links)" in row_of(slow, "tp=4")["reason"]


def test_only_what_divides_the_model() -> None:
    result = plan("qwen2.5-7b", "h100-sxm", gpus=8)
    assert row_of(result, "tp=8")["reason"] == "28 query heads are not a multiple of tp=8"
    assert row_of(result, "tp=4 x dp=2")["fits"]
    assert "48 layers are fewer than pp=64" in row_of(plan("qwen3-30b-a3b", "h100-sxm", gpus=64), "pp=64")["reason"]
    experts = plan("mixtral-8x7b", "h200", gpus=16, batch=64)
    assert row_of(experts, "dp=16 x ep=16")["reason"] == "8 experts are not a multiple of dp x tp = 16"
    assert row_of(experts, "pp=2 x dp=8 x ep=8")["fits"]


def test_a_rate_of_requests_fills_the_machine() -> None:
    def at(rate: float) -> dict[str, Any]:
        return plan("llama-3.1-70b", "h200", gpus=8, rate=rate, prompt=1024, output=512, dtype="fp8")

    slow, fast = (row_of(at(rate), "tp=8") for rate in (1.0, 8.0))
    for rate, row in ((1.0, slow), (8.0, fast)):
        in_flight = rate * (row["ttft_ms"] + 512 * row["tpot_ms"]) / 1e3
        assert in_flight <= row["batch"] < in_flight + 2
    assert fast["tpot_ms"] > slow["tpot_ms"]
    assert at(1e5)["recommended"] is None


def test_commands() -> None:
    def lines(model: str, dtype: str = "bfloat16", **layout: Any) -> dict[str, str]:
        return commands(deployment(model, "h100-sxm", **layout, load=Load(batch=1024, context=1024, dtype=dtype)), "m")

    two_nodes = lines("llama-3.1-405b", tp=8, pp=2)
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 2" in two_nodes["vllm"]
    assert "--nnodes 2 --master-addr HEAD --node-rank 0\n" in two_nodes["vllm"] and "--headless" in two_nodes["vllm"]
    assert "--tp-size 8 --pp-size 2" in two_nodes["sglang"] and "--dist-init-addr HEAD:20000" in two_nodes["sglang"]
    assert "--tp_size 8 --pp_size 2" in two_nodes["tensorrt-llm"]
    assert two_nodes["tensorrt-llm"].startswith("srun --mpi=pmix -N 2 --ntasks-per-node 8 trtllm-llmapi-launch")
    replicas = lines("llama-3.1-8b", "fp8", dp=8)
    assert "--data-parallel-size 8" in replicas["vllm"] and "--quantization fp8" in replicas["vllm"]
    assert "--max-num-seqs 128" in replicas["vllm"]  # of each replica
    assert "# 8 such servers" in replicas["sglang"] and "# 8 such servers" in replicas["tensorrt-llm"]
    spread = lines("qwen3-235b-a22b", dp=16, ep=True)
    assert "--enable-expert-parallel" in spread["vllm"] and "--data-parallel-size-local 8" in spread["vllm"]
    assert "--ep-size 16 --dp-size 16 --enable-dp-attention" in spread["sglang"]
    assert "--ep_size 16" in spread["tensorrt-llm"] and "enable_attention_dp: true" in spread["tensorrt-llm"]
    recommended = plan("llama-2-7b", "h100-sxm", gpus=1)["recommended"]
    assert "vllm serve meta-llama/Llama-2-7b-chat-hf --tensor-parallel-size 1" in recommended["commands"]["vllm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 0}, "gpus=0"),
        ({"gpus": 8, "objective": "price"}, "latency, throughput"),
        ({"gpus": 8, "rate": 3.0}, "output"),
        ({"gpus": 8, "batch": 0}, "batch=0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan("llama-2-70b", "h100-sxm", **arguments)


def test_command_line() -> None:
    runner = CliRunner()
    asked = ["plan", "--model", "llama-3.1-405b", "--hardware", "h100-sxm", "--gpus", "16", "--context", "4096"]
    done = runner.invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output)
    assert {"layout", "fits", "reason", "memory_gb_per_gpu", "tpot_ms", "ttft_ms", "tokens_per_s"} <= set(
        result["layouts"][0]
    )
    assert result["recommended"]["layout"] == result["layouts"][0]["layout"]
    shown = runner.invoke(app, asked).output
    assert "tp=8 x dp=2 does not fit: 101.5 GB of weights" in shown and "vllm serve" in shown
    assert runner.invoke(app, ["plan", "--model", "llama-3.1-405b", "--gpus", "8"]).exit_code == 1
