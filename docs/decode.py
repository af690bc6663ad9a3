"""Measures the README's figure on this machine and draws it: python docs/decode.py (about a minute)."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

NAMES = {"one rank": "one rank", "sockets alone": "TP=2, sockets", "layout": "TP=2, shared memory"}
HERE = Path(__file__).parent


def main() -> None:
    command = [sys.executable, "-m", "labkit", "bench", "decode", "--tp", "2", "--compare", "--threads", "1",
               "--dtype", "float32", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {row["name"]: row for row in json.loads(done.stdout)["results"]}
    rows = {shown: found[name] for name, shown in NAMES.items()}
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for name, row in rows.items():
        comm = max(rank["decode_comm_ms_per_token"] for rank in row["ranks"])
        axes.barh(name, row["tpot_ms"] - comm, color="#0072B2", label="computing")
        axes.barh(name, comm, left=row["tpot_ms"] - comm, color="#E69F00", hatch="//", label="communicating, waiting")
        spread = sorted(row["tpot_ms_all"])
        label = f" {row['tpot_ms']:.0f} ms ({spread[0]:.0f}-{spread[-1]:.0f}), {comm / row['tpot_ms']:.0%} of it communication"
        axes.text(row["tpot_ms"], name, label, va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(row["tpot_ms"] for row in rows.values()) * 2.1)
    axes.set_xlabel("ms per output token, median of 5 runs (their range)")
    one = rows["one rank"]
    axes.set_title(f"SmolLM2-135M, batch 1, {one['dtype']}, one thread per rank\n{one['hardware']}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside lower right", ncols=2, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "decode.png", dpi=130)


if __name__ == "__main__":
    main()
