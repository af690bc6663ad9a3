"""What the commands share: options, and how results are printed."""

import json
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()

ModelName = Annotated[
    str, typer.Option("--model", help="smollm2-135m, tiny-moe, a folder, a .gguf file, random:NAME, or a Hub id")
]
Tp = Annotated[int, typer.Option("--tp", help="tensor-parallel degree")]
Pp = Annotated[int, typer.Option("--pp", help="pipeline stages")]
Dp = Annotated[int, typer.Option("--dp", help="data-parallel replicas")]
Ep = Annotated[bool, typer.Option("--ep", help="spread the experts of a mixture-of-experts model over dp x tp")]
RankOrder = Annotated[
    str, typer.Option(help="neighbours last: dp-pp-tp keeps tensor-parallel ranks on one host, dp-tp-pp stages")
]
ExpertExchange = Annotated[
    str, typer.Option(help="how tokens reach experts on other ranks: all_to_all, all_gather or all_reduce")
]
ExpertPlacement = Annotated[str, typer.Option(help="which rank has which experts: contiguous or round-robin")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")]
Threads = Annotated[int | None, typer.Option("--threads", help="threads of each rank (default: cores over ranks)")]
LinkRate = Annotated[
    str | None, typer.Option("--link", help="emulate a link between ranks: 1gbit, 200mbit,50us, 1gbit,2ranks/host")
]
Overlap = Annotated[str, typer.Option("--overlap", help="hide communication: none, chunks or two-batch")]
Batch = Annotated[int, typer.Option(help="sequences at once")]
MaxNumSeqs = Annotated[int, typer.Option(help="sequences in flight at once, on each replica")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def finish(result: Any, as_json: bool, show: Callable[[], Any], ok: bool = True) -> None:
    """Prints a command's result, under torchrun on its first rank alone, and ends it."""
    if "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0":
        pass
    elif as_json:
        print(json.dumps(result))
    else:
        show()
    raise typer.Exit(0 if ok else 1)


def plain_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*map(cell, row.values()))
    console.print(table)


def cell(value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def degrees(report: dict[str, Any]) -> str:
    """The layout in words."""
    return " x ".join(f"{k}={v}" for k, v in report["layout"].items() if v > 1) or (
        "one rank" if report["layout"] else "unknown layout"
    )


def show_report(report: dict[str, Any]) -> None:
    """A report in five lines."""
    ranks = report["ranks"]
    calls = sum(c["calls_per_token"] for c in report["comm"] if c["phase"] == "decode")
    comm_ms = max(rank["decode_comm_ms_per_token"] for rank in ranks)
    tpot = "" if report["tpot_ms"] is None else f", TPOT {report['tpot_ms']:.1f} ms"
    lines = {
        "layout": f"{degrees(report)}, {report['dtype']}, {report['backend']}, {report['threads_per_rank']} thread(s) per rank",
        "machine": report["hardware"],
        "speed": f"{report['tokens_per_s']:.1f} tokens/s, TTFT {report['ttft_ms']:.0f} ms{tpot}",
        "between ranks": f"{calls:.1f} calls and {comm_ms:.1f} ms per decoded token, waiting included",
        "memory": f"{max(r['weights_bytes'] for r in ranks) / 1e6:.1f} MB of weights on the fullest rank",
    }
    if any(rank["shared_memory"] for rank in ranks):
        lines["layout"] += ", shared memory"
    if report["hosts"] > 1:
        sent = report["between_hosts_bytes_per_token"]["decode"]
        lines["hosts"] = f"{report['hosts']}; {sent:,.0f} bytes per decoded token between them"
    if report["link"]:
        rate = report["link"]["measured_gbit_per_s"]
        lines["link"] = report["link"]["label"] + (f"; measured {rate:.3g} Gbit/s" if rate else "")
    if report["oversubscribed"]:
        lines["mind"] = "oversubscribed (more ranks than devices): counts and bytes hold, times say little"
    for name, text in lines.items():
        print(f"{name + ':':15}{text}")
