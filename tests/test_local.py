"""Constants of this machine: what the probes' times are taken apart into, and that it is measured through the engine, once."""

import json
from pathlib import Path
from typing import Any

import pytest

from labkit.mesh import Layout
from labkit.model.config import ModelConfig
from labkit.model.shapes import SHAPES
from labkit.predict import local
from labkit.predict.cost import Load, predict
from labkit.predict.local import Constants, Setting, solve


@pytest.fixture
def tiny_probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Probes of next to nothing, and a cache of their own."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(local, "SMALL", (local._probe(1, 64, 64, 2, 2), local._probe(3, 64, 64, 2, 2)))
    monkeypatch.setattr(local, "LARGE", (local._probe(6, 384, 1536, 6, 3), local._probe(3, 768, 3072, 12, 4)))
    monkeypatch.setattr(local, "memory_bandwidth", lambda threads: 10.0)  # measured, it would be another each time
    for name, value in {"LONG": 40, "PROMPTS": (24, 48), "TOKENS": 4, "REPEATS": 1, "EXCHANGED": (64, 4096)}.items():
        monkeypatch.setattr(local, name, value)
    return tmp_path / "local.json"


def test_amounts_and_times_give_prices() -> None:
    prices = {"step": 3e-4, "layer": 2e-5, "byte": 6e-11}
    amounts = [{"step": 1, "layer": n, "byte": size} for n in (2, 18, 32) for size in (0.0, 1e8, 3e8)]
    times = [sum(prices[name] * amount for name, amount in each.items()) for each in amounts]
    assert solve(list(zip(amounts, times, times, strict=True))) == pytest.approx(prices)
    # What would come out below zero, because points that have it took less time, is left out.
    points = [({"a": 1, "b": 0}, 2.0), ({"a": 2, "b": 0}, 4.0), ({"a": 1, "b": 1}, 1.5), ({"a": 2, "b": 1}, 3.5)]
    found = solve([(amounts, seconds, seconds) for amounts, seconds in points])
    assert found["b"] == 0 and 1.5 < found["a"] < 2
    # A part that is little beside its step, and so measured badly, counts little.
    assert solve([({"a": 8}, 16.0, 20.0), ({"a": 1}, 0.2, 20.0)])["a"] == pytest.approx(2, rel=0.02)


def test_prices_between_and_beyond_what_was_measured() -> None:
    byte = [[0, 0], [2, 1], [4, 2], [12, 6], [36, 18]]
    known = Constants("today", "bfloat16", 0, 0, 0, [500, 2000], [8, 4], byte, 0, 0, 0, 0)
    assert known.of_a_byte(1, 500, 2) == 4 and known.of_a_byte(8, 2000, 2) == 8
    assert known.of_a_byte(3, 500, 2) == 7  # between 2 and 4 tokens
    assert known.of_a_byte(1, 1000, 2) == pytest.approx(3)  # half way, in logarithms
    assert known.of_a_byte(1, 100, 2) == 4 and known.of_a_byte(1, 9000, 2) == 2
    assert known.of_a_byte(64, 500, 2) == 80  # twice as many tokens as were measured
    assert known.of_a_byte(4, 500, 1) == 12  # half the bandwidth: twice as long for the reading, not for the rest


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_and_bytes_are_the_decoders(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "usable_cores", lambda: 2)
    at = local.deployment("tinyllama-1.1b", Layout(tp=tp), Load(dtype="bfloat16"))
    cfg = ModelConfig.from_dict(SHAPES["tinyllama-1.1b"])
    work = at.work(0, 1, 1, 100, 100)
    heads = (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim // tp
    assert work.rows == cfg.layers * (heads + cfg.hidden + 2 * cfg.intermediate // tp + cfg.hidden)
    assert work.read == 2 * cfg.layers * cfg.layer_params / tp and at.head_read == 2 * cfg.vocab * cfg.hidden / tp
    assert work.kv == cfg.layers * 2 * cfg.kv_heads // tp * cfg.head_dim * 2 * 100
    odd = local.deployment("smollm2-135m", Layout(), Load(dtype="bfloat16"))  # 3 KV heads over the threads of one rank
    threads = odd.setting.threads
    assert odd.work(0, 1, 1, 100, 100).kv == -(-3 // threads) * threads / 3 * 30 * 2 * 3 * 64 * 2 * 100


def test_measured_once_through_the_engine_and_kept(tiny_probes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = predict("tinyllama-1.1b", "local", batch=2, context=64)
    kept = json.loads(tiny_probes.read_text())
    assert kept["machine"] == local._machine()
    [(key, constants)] = kept["measured"].items()
    assert key.startswith("tp=1, 1 busy")
    assert min(min(row) for row in constants["byte"]) >= 0 and max(constants["reads"]) > 0
    assert {"weights and products", "step"} <= {term["name"] for term in first["terms"]}
    assert sum(term["ms"] for term in first["terms"]) == pytest.approx(first["tpot_ms"])
    assert all(constants["measured"] in term["source"] for term in first["terms"])
    assert first["ttft_ms"] > 0 and first["memory"]["fits"]

    def not_again(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(local, "measure", not_again)
    assert predict("tinyllama-1.1b", "local", batch=2, context=64) == first
    tiny_probes.write_text(json.dumps({**kept, "machine": "another"}))
    with pytest.raises(AssertionError, match="measured again"):
        predict("tinyllama-1.1b", "local")
    local.forget()
    assert not tiny_probes.exists()


def test_two_ranks_and_two_stages(tiny_probes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "usable_cores", lambda: 2)
    cut = predict("tinyllama-1.1b", "local", tp=2, batch=2, context=64)
    assert {"all-reduce", "logits"} <= {term["name"] for term in cut["terms"]}
    one, two = (predict("tinyllama-1.1b", "local", pp=2, batch=batch, context=64) for batch in (1, 2))
    assert "pipeline hops" in {term["name"] for term in one["terms"]}
    settings = {
        key.rsplit(",", 1)[0] for key in json.loads(tiny_probes.read_text())["measured"] if key.startswith("tp")
    }
    threads = local.threads_per_rank(2)
    assert settings == {str(Setting(2, 1, threads)), str(Setting(1, 1, threads)), str(Setting(1, 2, threads))}
    assert two["tokens_per_s"] != one["tokens_per_s"]
    [row] = local.compared("random:smollm2-135m", [Layout(tp=2)], batches=(1,), contexts=(32,))
    assert row["measured_ms"] > 0 and row["error"] == row["predicted_ms"] / row["measured_ms"] - 1


def test_what_was_not_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "usable_cores", lambda: 2)
    for arguments, message in (
        ({"tp": 4}, "4 ranks on 2 core"), ({"output": 100}, "without the load of a server"), ({"dtype": "fp8"}, "not supported"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            predict("tinyllama-1.1b", "local", **arguments)
    with pytest.raises(ValueError, match="only for dense models"):
        predict("mixtral-8x7b", "local")
