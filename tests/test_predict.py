"""The cost model: its bytes are the engine's, its times hold up against published ones that were held out, its terms add up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from labkit.cli import app
from labkit.model.errors import ModelError
from labkit.model.shapes import SHAPES
from labkit.predict import calibrate
from labkit.predict.cost import Load, deployment, engine, engines, predict
from labkit.predict.dryrun import dryrun
from labkit.predict.hardware import (
    INTERNODE_SECONDS,
    Curve,
    all_reduce,
    curves,
    expert_exchange,
    hardware,
    hop,
    in_node,
    table,
)
from labkit.predict.shape import OTHERS, shape_of
from labkit.split import LayoutError


def terms(result: dict[str, Any]) -> dict[str, float]:
    return {term["name"]: term["ms"] for term in result["terms"]}


# -- bytes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("smollm2-135m", {"tp": 4, "pp": 2}),  # uneven heads, a tied embedding that two stages hold
        ("qwen2.5-7b", {"tp": 2, "pp": 3}),  # biases, uneven stages
        ("qwen3-30b-a3b", {"tp": 2}),  # norms of queries and keys, experts cut over tp
        ("tiny-moe", {"tp": 2, "dp": 2, "ep": True}),
    ],
)
def test_bytes_are_those_of_the_dry_run(model: str, layout: dict[str, Any]) -> None:
    load = Load(batch=4, context=128, prompt=127)
    at = deployment(model, "h100-sxm", **layout, load=load)
    at = replace(at, engine=replace(at.engine, head="all"))  # as the engine here has it
    dry = dryrun(model, **layout, batch=4, context=128, dtype="bfloat16")
    for rank in dry["ranks"]:
        assert at.weights(rank["stage"], rank["place"]["tp"]) == rank["weights_bytes"]
        assert at.kv(rank["stage"], rank["place"]["tp"]) == rank["kv_bytes"]
        held = rank["peak_bytes"] - rank["weights_bytes"] - rank["kv_bytes"]
        assert held / 3 < at.activations(rank["stage"]) < held * 3  # a rough formula, for a margin
    wire = max(rank["wire_bytes_per_token"]["decode"] for rank in dry["ranks"])
    # Of experts the dry run has one sample, the formula what is to be expected.
    assert at.wire_bytes_per_token() == pytest.approx(wire, rel=0.1 if layout.get("ep") else 0)


@pytest.mark.parametrize(("name", "params"), [("deepseek-v3", 671_026_419_200), ("gpt-oss-120b", 116_829_156_672)])
def test_shapes_that_the_engine_does_not_run(name: str, params: int, tmp_path: Path) -> None:
    at = deployment(name, "b200", load=Load())
    assert at.weights(0) / 2 == pytest.approx(params, rel=5e-4)
    (tmp_path / "config.json").write_text(json.dumps(OTHERS[name]))
    read = shape_of(str(tmp_path / "config.json"))
    assert replace(read, name=name) == at.shape == shape_of(name)
    assert shape_of(str(tmp_path)) == replace(read, name=str(tmp_path))


def test_latent_attention_is_cached_once_for_all_heads() -> None:
    tp1, tp8 = (deployment("deepseek-v3", "h200", tp=tp) for tp in (1, 8))
    assert tp1.kv_bytes_per_token(0) == tp8.kv_bytes_per_token(0) == 61 * (512 + 64) * 2
    llama = [deployment("llama-3.1-70b", "h200", tp=tp).kv_bytes_per_token(0) for tp in (1, 8, 16)]
    assert llama == [327_680, 40_960, 40_960]  # 8 KV heads: with 16 ranks two hold the same


def test_sliding_windows_read_less() -> None:
    shape = shape_of("gpt-oss-120b")
    assert shape.kv_tokens(64) == 64
    assert shape.kv_tokens(10_000) == (10_000 + 128) / 2  # every other layer looks back over 128 tokens


def test_narrow_weights() -> None:
    sizes = {
        dtype: deployment("llama-2-7b", "h100-sxm", load=Load(dtype=dtype)).weights(0)
        for dtype in ("bfloat16", "fp8", "int8", "int4")
    }
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    table = 32000 * 4096
    assert sizes["bfloat16"] - sizes["fp8"] == matrices  # embedding, head and norms stay in 16 bits
    assert sizes["fp8"] - sizes["int8"] == table  # weight-only quantisation takes the head too
    assert sizes["int8"] - sizes["int4"] == pytest.approx((matrices + table) * (0.5 - 4 / 128))


# -- times ---------------------------------------------------------------------------------------------------------------


def test_published_times_that_were_held_out() -> None:
    result = calibrate.validation()
    assert result["decode_held_out"]["rows"] >= 35
    assert result["decode_held_out"]["median"] <= 0.10
    assert result["decode_held_out"]["worst"] <= 0.25
    assert result["decode_held_out_typical_engine"]["median"] <= 0.10
    assert result["collectives_held_out"]["median"] <= 0.15
    stored = json.loads((Path(calibrate.__file__).parent / "engines.json").read_text())["errors"]
    for name in ("decode_held_out", "decode_fitted", "collectives_held_out"):
        assert stored[name] == pytest.approx(result[name], rel=0.01), f"engines.json is out of date: {name}"


def test_engines_are_what_a_fit_gives() -> None:
    for name, fitted in calibrate.calibrate().items():
        for constant in ("bandwidth", "arithmetic", "layer_us", "sequence_us", "moe_layer_us"):
            stored = getattr(engines()[name], constant)
            assert stored == pytest.approx(getattr(fitted, constant), rel=0.01), (name, constant)


def test_constants_of_one_gpu_hold_on_another() -> None:
    served = [row for row in calibrate.rows() if row["engine"] == "vllm"]
    h200 = [row for row in served if row["hardware"] == "h200" and row["use"] == "fit"]
    fitted = calibrate.fit(engine("vllm"), ("bandwidth", "arithmetic", "layer_us", "sequence_us"), h200)
    errors = [calibrate.predicted(row, fitted) / row["tpot_ms"] - 1 for row in served if row["hardware"] == "h100-sxm"]
    assert sorted(map(abs, errors))[len(errors) // 2] < 0.05


def test_a_roofline_alone_is_far_too_low() -> None:
    result = predict("llama-2-7b", "a100-80gb", tp=4, engine_="gpt-fast", context=105)
    assert result["tpot_ms"] == pytest.approx(3.94, rel=0.1)  # published
    assert terms(result)["weights"] * engine("gpt-fast").bandwidth < 0.56 * 3.94


def test_terms_add_up_and_name_their_sources() -> None:
    for layout in ({"tp": 8}, {"tp": 2, "pp": 4}, {"tp": 2, "dp": 4, "ep": True}):
        result = predict("mixtral-8x22b", "h200", **layout, batch=32, context=4096, prompt=3000, output=2192)
        for total, parts in (("tpot_ms", "terms"), ("ttft_ms", "ttft_terms")):
            assert sum(term["ms"] for term in result[parts]) == pytest.approx(result[total])
            assert all(term["ms"] > 0 and term["source"] for term in result[parts])
        assert result["tokens_per_s"] == pytest.approx(32 / result["tpot_ms"] * 1e3)


def test_each_term_follows_its_cause() -> None:
    def at(spec: str = "h100-sxm", **more: Any) -> dict[str, float]:
        return terms(predict("llama-3.1-70b", spec, **{"tp": 4, "batch": 8, "context": 4096, **more}))

    base = at()
    assert at(context=8192)["KV cache"] == pytest.approx(2 * base["KV cache"])
    assert at(tp=8)["weights"] == pytest.approx(base["weights"] / 2, rel=0.01)
    assert at(tp=8)["layers"] == base["layers"]
    assert at("h100-sxm,bandwidth_gbs=6700")["weights"] == pytest.approx(base["weights"] / 2)
    assert at("h100-sxm,link_gbs=45")["all-reduce"] > 1.2 * base["all-reduce"]
    assert "arithmetic beyond reading" not in base
    assert at(batch=512)["arithmetic beyond reading"] > 0


def test_pipelines() -> None:
    one, two = (predict("llama-3.1-70b", "h100-sxm", tp=4, pp=pp, batch=1) for pp in (1, 2))
    assert one["tpot_ms"] < two["tpot_ms"] < 1.05 * one["tpot_ms"]  # one sequence gains nothing
    many = [predict("llama-3.1-70b", "h100-sxm", tp=4, pp=pp, batch=64 * pp)["tokens_per_s"] for pp in (1, 2)]
    assert 1.7 < many[1] / many[0] < 2.05  # with as many sequences on each stage, two stages do twice the work
    assert terms(predict("llama-3.1-70b", "h100-sxm", tp=4, pp=3, batch=64))["waiting for the slowest stage"] > 0
    here, apart = (terms(predict("llama-3.1-405b", "h100-sxm", tp=tp, pp=2))["pipeline hops"] for tp in (4, 8))
    assert apart > here  # eight and eight: on two nodes
    prompts = predict("llama-3.1-405b", "h100-sxm", tp=8, pp=2)["ttft_terms"]
    assert "pipeline hops" in [term["name"] for term in prompts]
    chunked = [predict("llama-3.1-405b", "h100-sxm", tp=8, pp=pp, context=65536, step=2048)["ttft_ms"] for pp in (1, 2)]
    assert chunked[1] < 0.6 * chunked[0]  # pieces of one prompt follow each other through the stages


def test_experts() -> None:
    alone = terms(predict("mixtral-8x7b", "h200", batch=1))["weights"]
    crowd = terms(predict("mixtral-8x7b", "h200", batch=64))["weights"]
    active, total = 12.75, 46.57  # billions of parameters read for one token, and in all
    assert crowd / alone == pytest.approx(total / active, rel=0.02)
    even, skewed = (
        predict("qwen3-235b-a22b", "h200", dp=8, ep=True, batch=512, imbalance=imbalance) for imbalance in (1.0, 2.0)
    )
    assert "expert imbalance" not in terms(even)
    assert skewed["tpot_ms"] == pytest.approx(even["tpot_ms"] + terms(skewed)["expert imbalance"])
    assert terms(even)["expert combine"] > 0.9 * terms(even)["expert dispatch"] > 0


def test_prompts_of_others_slow_a_server_down() -> None:
    calm = predict("llama-3.1-70b", "h200", tp=4, batch=16, context=1536)
    busy = predict("llama-3.1-70b", "h200", tp=4, batch=16, prompt=1024, output=1024)
    assert busy["context"] == calm["context"]
    extra = {name: ms for name, ms in terms(busy).items() if "others" in name}
    assert busy["tpot_ms"] == pytest.approx(calm["tpot_ms"] + sum(extra.values()))
    assert len(extra) == 2


# -- hardware and exchanges ----------------------------------------------------------------------------------------------


def test_curves() -> None:
    curve = Curve.of([1, 4, 16], [1.0, 9.0, 4.0], "")
    assert curve.at(0.5) == curve.at(1) == 1.0
    assert curve.at(4) == 4.0  # not 9: filled up to 16 it would take 4
    assert curve.at(2) == pytest.approx(2.0)  # log-log
    assert curve.at(160) == 40.0


def test_exchanges_grow_with_ranks_bytes_and_distance() -> None:
    hw = hardware("h100-sxm")
    for seconds in (
        [all_reduce(hw, "vllm", ranks, 16384).seconds for ranks in (1, 2, 3, 4, 6, 8, 16, 32)],
        [all_reduce(hw, "vllm", 8, size).seconds for size in (1e3, 1e5, 1e6, 1e8, 1e9)],
        [expert_exchange(hw, "dispatch", ranks, 1e7).seconds for ranks in (8, 16, 64, 128)],
        [hop(hw, 1e7, across).seconds for across in (False, True)],
        [all_reduce(hardware(f"h100-sxm,link_gbs={rate}"), "nccl", 8, 1e8).seconds for rate in (900, 450, 100)],
    ):
        assert seconds == sorted(seconds) and len(set(seconds)) == len(seconds)
    two, four = (all_reduce(hw, "vllm", ranks, 512).seconds for ranks in (16, 32))  # nodes: one level of the tree more
    assert four - two == pytest.approx(2 * INTERNODE_SECONDS, rel=0.01)
    measured = curves()["h100-sxm", "all_reduce", "vllm"][4]
    assert in_node(hw, "all_reduce", "vllm", 4, measured.sizes[5]).seconds == measured.seconds[5]


def test_hardware_given_by_the_user(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"memory_gb": 96, "bandwidth_gbs": 4000, "bf16_tflops": 148, "link": "pcie", "link_gbs": 63})
    )
    mine = hardware(str(file))
    assert (mine.name, mine.tables) == ("mine", "rtx-pro-6000")
    assert hardware(f"{file},memory_gb=48").memory_gb == 48
    assert hardware("memory_gb=96,bandwidth_gbs=4000,bf16_tflops=148").bf16_tflops == 148
    assert hardware("H100-SXM") == table()["h100-sxm"]
    for wrong, message in (
        ("h1000", "use a100-40gb"), ("h100-sxm,speed=3", "no field speed"), ("memory_gb=96", "bandwidth_gbs, bf16_tflops"),
        ("h100-sxm,link_gbs=fast", "fast"), ("h100-sxm,link_gbs=0", "above 0"), ("h100-sxm,link=air", "switch, mesh, pcie"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            hardware(wrong)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tp": 65}, LayoutError, "64 query heads"),
        ({"pp": 81}, LayoutError, "80 layers"),
        ({"ep": True}, ModelError, "no experts"),
        ({"dtype": "int3"}, ValueError, "int4"),
        ({"batch": 0}, ValueError, "batch=0"),
        ({"engine_": "wllm"}, ValueError, "tensorrt-llm"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict("llama-2-70b", "h100-sxm", **arguments)


def test_every_row_names_its_source() -> None:
    assert all(hw.source for hw in table().values())
    assert all(curve.source.startswith("https://") for ranks in curves().values() for curve in ranks.values())
    assert all(row["source"].startswith("https://") for row in calibrate.rows())
    assert {row["hardware"] for row in calibrate.rows()} <= set(table())
    assert {row["model"] for row in calibrate.rows()} <= set(SHAPES) | set(OTHERS)


def test_command_line() -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["predict", "--model", "llama-2-70b", "--hardware", "a100-80gb", "--tp", "4", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output)
    assert {"tpot_ms", "ttft_ms", "tokens_per_s", "memory_gb_per_gpu", "comm_bytes_per_token", "terms"} <= set(result)
    assert "weights" in runner.invoke(app, ["predict", "--tp", "4"]).output
    assert "decode held out" in runner.invoke(app, ["predict", "--validate"]).output
    done = runner.invoke(app, ["dryrun", "--model", "tinyllama-1.1b", "--tp", "2", "--context", "16", "--json"])
    assert {"ranks", "comm"} <= set(json.loads(done.output))
    assert "0-1" in runner.invoke(app, ["dryrun", "--model", "tinyllama-1.1b", "--tp", "2", "--context", "16"]).output
