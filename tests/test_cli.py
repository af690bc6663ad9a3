"""The command line as people and scripts use it: text for people, one JSON object with --json, honest exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from labkit.cli import main
from labkit.shm import library

REPORT = {
    "layout", "hardware", "backend", "dtype", "threads_per_rank", "oversubscribed", "tokens_per_s", "ttft_ms", "tpot_ms",
    "bubble_fraction", "ranks", "comm",
}  # fmt: skip
RANK = {"rank", "stage", "weights_bytes", "bytes_read", "kv_bytes", "peak_rss_bytes"}
COMM = {
    "op", "axis", "phase", "what", "calls_per_token", "payload_bytes_per_token", "wire_bytes_per_token", "ms_per_token",
    "hidden_ms_per_token",
}  # fmt: skip


def labkit(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "labkit", *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == code, f"exit {done.returncode}: {done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    return done


def check_report(report: dict, layout: dict) -> None:
    assert report.keys() >= REPORT
    assert report["layout"] == layout
    assert report["tokens_per_s"] > 0 and report["ttft_ms"] > 0 and report["tpot_ms"] > 0
    assert all(rank.keys() >= RANK and rank["peak_rss_bytes"] > rank["weights_bytes"] for rank in report["ranks"])
    assert all(entry.keys() == COMM for entry in report["comm"])


def test_generate_json_is_one_object_with_the_report() -> None:
    done = labkit("generate", "The capital of France is", "--tp", "2", "--max-tokens", "6", "--json")
    result = json.loads(done.stdout)
    assert result.keys() == {"text", "token_ids", "layout", "report"}
    assert len(result["token_ids"]) == 6 and result["text"]
    check_report(result["report"], {"tp": 2, "pp": 1, "dp": 1, "ep": 1})


def test_generate_for_people() -> None:
    done = labkit("generate", "What is the capital of France?", "--chat", "--max-tokens", "20")
    assert "Paris" in done.stdout and "TPOT" in done.stdout


@pytest.mark.parametrize(
    "layout", [["--tp", "2"], ["--dp", "2", "--ep", "--model", "tiny-moe"]], ids=["tensor", "expert"]
)
def test_torchrun_gives_the_same_tokens_and_prints_once(layout: list[str]) -> None:
    arguments = ["generate", "The tide", *layout, "--max-tokens", "6", "--json"]
    launched = json.loads(labkit(*arguments).stdout)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "labkit", *arguments],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    in_place = json.loads(done.stdout)
    assert in_place["token_ids"] == launched["token_ids"]
    check_report(in_place["report"], launched["layout"])
    assert [r["rank"] for r in in_place["report"]["ranks"]] == [0, 1]


def test_bench_experts() -> None:
    sizes = ["--batch", "2", "--prompt", "16", "--tokens", "3", "--repeats", "1"]
    done = labkit("bench", "experts", *sizes, "--dtype", "float32", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)["results"]}
    assert [row["layout"]["ep"] for row in rows.values()] == [2] * 5 + [1] * 3
    assert rows.keys() >= {"all_to_all, by load", "TP=2 in experts", "one rank"}
    assert all(row["same_tokens"] for row in rows.values())
    hidden, prompts = 192, 32
    assert rows["TP=2 in experts"]["exchange_bytes"] == hidden * 4  # ring of two: 2 (n - 1) / n = 1 payload
    assert rows["all_gather"]["exchange_bytes"] == hidden * 4  # half of the tokens each, there and back
    assert rows["2 replicas"]["exchange_bytes"] == rows["one rank"]["exchange_bytes"] == 0
    for row in (row for row in rows.values() if row["layout"]["ep"] == 2):
        assert sum(rows["one rank"]["experts"]["layers"][0]["tokens"]) == sum(row["experts"]["layers"][0]["tokens"])
        assert row["busiest_over_mean"] >= 1 and sum(r["prompt_tokens"] for r in row["ranks"]) == prompts
    assert "has no experts" in labkit("bench", "experts", "--model", "random:smollm2-135m", *sizes, code=2).stderr


def test_bench_decode() -> None:
    done = labkit(
        "bench", "decode", "--pp", "2", "--tokens", "5", "--prompt", "4", "--batch", "2", "--repeats", "3",
        "--temperature", "0.8", "--top-p", "0.9", "--json",
    )  # fmt: skip
    row, greedy = json.loads(done.stdout)["results"]
    assert (row["name"], greedy["name"]) == ("layout", "greedy") and not greedy["same_tokens"]
    check_report(row, {"tp": 1, "pp": 2, "dp": 1, "ep": 1})
    assert len(row["tpot_ms_all"]) == 3 and row["tpot_ms"] == sorted(row["tpot_ms_all"])[1]
    assert row["weights_gb_per_s"] > 0
    assert row["roofline_share"] > 0 and row["memory_gb_per_s"] > 0 and row["tflops"] > 0


def test_bench_decode_compares_with_sockets_and_one_rank() -> None:
    done = labkit(
        "bench", "decode", "--model", "random:smollm2-135m", "--tp", "2", "--tokens", "4", "--prompt", "4",
        "--repeats", "2", "--compare", "--json",
    )  # fmt: skip
    rows = json.loads(done.stdout)["results"]
    assert [row["name"] for row in rows] == ["layout", "sockets alone", "one rank"]
    assert [row["layout"]["tp"] for row in rows] == [2, 2, 1]
    assert [bool(row["ranks"][0]["shared_memory"]) for row in rows] == [library() is not None, False, False]
    assert rows[2]["speedup"] == 1 and rows[2]["comm_share"] == 0 and 0 < rows[0]["comm_share"] < 1
    assert {row["threads_per_rank"] for row in rows} == {rows[0]["threads_per_rank"]}
    gains = [one / ours for one, ours in zip(rows[2]["tpot_ms_all"], rows[0]["tpot_ms_all"], strict=True)]
    assert rows[0]["speedup"] == pytest.approx(sum(gains) / 2)
    assert all(len(row["memory_gb_per_s_all"]) == len(gains) == 2 for row in rows)


def test_bench_decode_for_people_shows_each_round_beside_the_memory(tmp_path: Path) -> None:
    tiny.write("llama", tmp_path)
    done = labkit(
        "bench", "decode", "--model", f"random:{tmp_path / 'config.json'}", "--tp", "2", "--tokens", "3", "--prompt", "4",
        "--repeats", "2", "--compare",
    )  # fmt: skip
    summary, rounds = done.stdout.split("round by round, by memory")
    assert all(
        re.search(rf"^ {name} +[\d.]+", summary, re.MULTILINE) for name in ("layout", "sockets alone", "one rank")
    )
    lines = re.findall(r"^ (\d) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) *$", rounds, re.MULTILINE)
    assert {line[0] for line in lines} == {"1", "2"}
    assert float(lines[0][5]) >= float(lines[1][5])
    for _, layout, _, one, speedup, *memory in lines:
        assert float(one) / float(layout) == pytest.approx(float(speedup), rel=0.02)
        assert all(float(rate) > 0.5 for rate in memory)


def test_bench_prefill_over_a_link_compares_tp_with_pp(tmp_path: Path) -> None:
    tiny.write("llama", tmp_path)
    done = labkit(
        "bench", "prefill", "--model", f"random:{tmp_path}/config.json", "--tp", "2", "--batch", "2", "--prompt", "8",
        "--step", "8", "--repeats", "1", "--link", "200mbit", "--compare", "--json",
    )  # fmt: skip
    rows = json.loads(done.stdout)["results"]
    assert [row["name"] for row in rows] == ["TP=2, no link", "PP=2, no link", "TP=2, 200mbit", "PP=2, 200mbit"]
    assert all(row["same_tokens"] and row["prompt_tokens_per_s"] > 0 for row in rows)
    assert [row["link"] and row["link"]["asked_gbit_per_s"] for row in rows] == [None, None, 0.2, 0.2]
    assert 0 < rows[2]["link"]["measured_gbit_per_s"] <= 0.21
    assert "SplitGroupWarning" not in done.stderr  # who asks for a slow link needs no warning of it


def test_bench_overlap_has_a_row_for_each_link_and_mode(tmp_path: Path) -> None:
    tiny.write("llama", tmp_path)
    done = labkit(
        "bench", "overlap", "--model", f"random:{tmp_path}/config.json", "--batch", "2", "--prompt", "8", "--repeats", "1",
        "--link", "200mbit", "--link", "1gbit", "--json",
    )  # fmt: skip
    rows = json.loads(done.stdout)["results"]
    assert [row["overlap"] for row in rows] == ["none", "chunks", "two-batch"] * 2
    assert [row["gain"] for row in rows][::3] == [1, 1]
    assert all(row["same_tokens"] for row in rows)
    assert [row["hidden_ms"] > 0 for row in rows] == [False, True, True] * 2


def test_bench_collectives_writes_rows_and_a_picture(tmp_path: Path) -> None:
    csv, plot = tmp_path / "rows.csv", tmp_path / "plot.png"
    done = labkit(
        "bench", "collectives", "--ranks", "2", "--largest", "2048", "--seconds", "0.002", "--ops", "all_reduce,ring",
        "--csv", str(csv), "--plot", str(plot), "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert {row["op"] for row in result["results"]} == {"all_reduce", "ring"}
    assert {"alpha_us", "held_out"} <= result["fits"][0].keys()
    assert len(csv.read_text().splitlines()) == 1 + len(result["results"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_generate_writes_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    labkit("generate", "The tide", "--tp", "2", "--max-tokens", "2", "--trace", str(path), "--json")
    events = json.loads(path.read_text())["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} >= {"compute", "tp: decode all_reduce mlp"}


def test_doctor() -> None:
    result = json.loads(labkit("doctor", "--json").stdout)
    assert all(check["ok"] for check in result["checks"]), result["checks"]
    assert Path(result["default_model_path"], "config.json").exists()


def test_doctor_says_what_fails_and_how_to_mend_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache's folder should be")
    monkeypatch.setenv("LABKIT_CACHE", str(blocked / "cache"))
    done = labkit("doctor", code=1)
    assert "[FAIL] default model" in done.stdout and "mend:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["generate", "hello", "--tp", "12"], 2, "tensor_parallel_size=12 does not fit 9 query heads"),
        (["generate", "hello", "--pp", "31"], 2, "use 1 to 30"),
        (["generate", "hello", "--dtype", "int3"], 2, "dtype='int3' is not supported"),
        (["generate", "hello", "--model", "random:smollm2-135m"], 1, "has no tokenizer"),
        (["generate", "hello", "--model", "nothing"], 1, "no model 'nothing'"),
        (["generate", "hello", "--ep"], 1, "has no experts"),
        (["generate"], 2, "Missing argument"),
        (["bench", "decode", "--tokens", "1"], 2, "tokens=1"),
        (["bench", "prefill", "--tp", "2", "--compare"], 2, "give a link"),
        (["bench", "pipeline", "--pp", "1"], 2, "pp=1, tokens=32: use 2 or more"),
        (["bench", "collectives", "--ops", "allreduce"], 2, "no operation 'allreduce'"),
        (["generate", "hello", "--link", "fast"], 2, "link 'fast'"),
        (["generate", "hello", "--overlap", "both"], 2, "overlap='both'"),
    ],
)
def test_what_cannot_be_done_is_one_line_without_a_traceback(
    arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["labkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == code
    assert said in shown.err and "Traceback" not in shown.err
    assert shown.out == ""
