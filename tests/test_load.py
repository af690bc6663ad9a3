"""The load test: figures by hand, and against what the loaded server itself has counted."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from labkit.lab import plots
from labkit.measure import serving
from labkit.measure.serving import Served, Work, server


def labkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "labkit", *arguments], capture_output=True, text=True, timeout=200)


def test_requests_are_random_and_the_same_each_time() -> None:
    work = Work((2, 5), (3, 4), seed=4)
    jobs = list(work.jobs(200))
    assert jobs == list(work.jobs(200)) and jobs != list(Work((2, 5), (3, 4), seed=5).jobs(200))
    assert {len(prompt) for prompt, _ in jobs} == {2, 3, 4, 5} and {tokens for _, tokens in jobs} == {3, 4}
    with pytest.raises(ValueError, match="output=9-3: use a range"):
        Work((1, 1), (9, 3))


def test_figures_of_a_load() -> None:
    first = Served(due=1.0, pieces=[1.5, 1.7, 2.1], prompt_tokens=4, tokens=3)
    late = Served(due=2.0, pieces=[4.0], prompt_tokens=4, tokens=1)
    row = serving._figures([first, late])
    assert row["achieved_per_s"] == 2 / 4 and row["tokens_per_s"] == 4 / 4
    for name, value in {"ttft_ms": 1250, "ttft_p95_ms": 1925, "tpot_ms": 300, "itl_ms": 300, "e2e_ms": 1550}.items():
        assert row[name] == pytest.approx(value), name
    assert serving._figures([late])["tpot_ms"] is None
    waits = serving._waits({"request_queue_time_seconds_sum": 1.0, "request_queue_time_seconds_count": 2},
                           {"request_queue_time_seconds_sum": 1.5, "request_queue_time_seconds_count": 4})  # fmt: skip
    assert waits == {"queue_ms": 250, "preemptions": None}


def test_a_server_has_generated_what_the_load_asked_for() -> None:
    with server("--model", "tiny-moe", "--dp", "2", "--max-model-len", "64", "--max-num-seqs", "2") as it:
        rows = serving.serve("", url=it.url, rates=[10, 60], seconds=1, prompt=(4, 30), output=(5, 30), seed=2)
        families = text_string_to_metric_families(httpx.get(f"{it.url}/metrics").text)
        sums = {s.name: s.value for family in families for s in family.samples}
    work = Work((4, 30), (5, 30), seed=2)
    wanted = sum(tokens for row in rows for _, tokens in work.jobs(row["requests"]))
    assert sums["labkit:generation_tokens_total"] == wanted + 2 * 2  # two requests of two tokens to warm up
    assert (wanted + 4) / 2 <= sums["labkit:engine_steps_total"] <= wanted + 4  # of one or two sequences
    few, many = rows
    assert few["roofline_share"] is None  # what runs at an address may be another machine
    assert 0 < few["requests"] < many["requests"] and many["rate"] == 60
    for row in rows:
        assert (row["name"], row["model"], row["batch"], row["layout"]["dp"]) == ("DP=2", "tiny-moe", 4, 2)
        for name in ("ttft", "tpot", "itl", "e2e"):
            assert 0 < row[f"{name}_ms"] <= row[f"{name}_p95_ms"] <= row[f"{name}_p99_ms"]
        assert row["e2e_ms"] > row["ttft_ms"] > 0 and 0 < row["achieved_per_s"] <= 1.5 * row["rate"]
        assert row["preemptions"] == 0 and 0 <= row["queue_ms"] <= row["ttft_p99_ms"]
    assert 0 < sums["labkit:time_to_first_token_seconds_sum"] < sums["labkit:e2e_request_latency_seconds_sum"]


def test_bench_serve_finds_its_rates_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "load.png"
    done = labkit("bench", "serve", "--model", "tiny-moe", "--seconds", "0.4", "--prompt", "8", "--output", "4-8",
                  "--max-num-seqs", "4", "--plot", str(picture), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    capacity = rows[0]["capacity_per_s"]
    assert [row["rate"] / capacity for row in rows] == pytest.approx(serving.FRACTIONS)
    assert {"hardware", "backend", "dtype", "threads_per_rank", "oversubscribed", "ranks", "comm"} <= rows[0].keys()
    assert all(row["name"] == "one rank" and row["roofline_share"] > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_loaded_is_said() -> None:
    with pytest.raises(OSError, match="http://127.0.0.1:9: .*connection"):
        serving.serve("", url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"rates=\[1, -2\], .*: use numbers above 0"):
        serving.serve("", url="http://127.0.0.1:9", rates=[1, -2])
    with (
        server("--model", "tiny-moe", "--max-model-len", "16") as it,
        pytest.raises(OSError, match="400, .*leaves no room"),
    ):
        serving.serve("", url=it.url, rates=[1], prompt=(17, 17))


def test_the_curve_of_a_load_has_alt_text() -> None:
    common = {"tpot_ms": 20.0, "tpot_p95_ms": 25.0, "ttft_p95_ms": 90.0}
    rows = [
        {"name": name, "tokens_per_s": rate, "ttft_ms": 60.0, **common}
        for name in ("one rank", "TP=2")
        for rate in (50.0, 99.0)
    ]
    data, metadata = plots.load(rows)._repr_mimebundle_()
    assert len(data["image/png"]) > 1000
    assert "one rank: at 50 tokens/s TTFT 60 ms (p95 90) and TPOT 20 ms, at 99" in metadata["image/png"]["alt"]
    assert len(plots.load(rows).axes[0].lines) == 4


def test_requests_over_time_have_alt_text() -> None:
    times = [(0.0, 0.1, 0.3, 1.0), (0.2, 1.0, 1.1, 2.0)]
    rows = [dict(zip(("arrived", "started", "first", "ended"), each, strict=True)) for each in times]
    picture = plots.requests(rows, [(0.0, 0), (0.1, 1), (2.0, 0)])
    assert "at most 1 in the batch" in picture.alt
    assert "request 1: came at 0.20 s, waiting 800 ms, prompt 100 ms, decoding 900 ms" in picture.alt
    assert len(picture.axes[0].patches) == 6
