"""`labkit bench ...`: measured figures."""

from pathlib import Path
from typing import Annotated, Any

import typer

from labkit.cli.common import (
    Batch,
    Dp,
    Dtype,
    Ep,
    Json,
    LinkRate,
    MaxNumSeqs,
    ModelName,
    Overlap,
    Pp,
    Threads,
    Tp,
    cell,
    console,
    degrees,
    finish,
    show_report,
)

bench = typer.Typer(help="Measured figures on a given layout: medians and spread.", no_args_is_help=True)

PromptTokens = Annotated[int, typer.Option("--prompt", help="prompt tokens of each")]
Repeats = Annotated[int, typer.Option(help="measured runs, after one to warm up")]


@bench.command("decode")
def bench_decode(
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "auto",
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Dp = 1,
    ep: Ep = False,
    batch: Batch = 1,
    prompt: PromptTokens = 32,
    tokens: Annotated[int, typer.Option(help="tokens to generate for each")] = 64,
    repeats: Repeats = 5,
    threads: Threads = None,
    link: LinkRate = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="on GPUs: without CUDA graphs")] = False,
    temperature: Annotated[float, typer.Option(help="sample, and compare with greedy decoding, taking turns")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="with a temperature: from the likeliest tokens, together as likely as this")
    ] = 1.0,
    compare: Annotated[bool, typer.Option(help="also through sockets alone, and one rank, taking turns")] = False,
    as_json: Json = False,
) -> None:
    """Decode speed: time per output token, tokens/s, and the part of it spent in communication.

    The roofline share is the least time that memory and arithmetic, as measured meanwhile, allow for it, over the time taken.
    """
    from labkit.measure.bench import decode

    rows = decode(
        model, dtype=dtype, tp=tp, pp=pp, dp=dp, ep=ep, batch=batch, prompt=prompt, tokens=tokens, repeats=repeats,
        threads=threads, link=link, enforce_eager=enforce_eager, temperature=temperature, top_p=top_p, compare=compare,
    )  # fmt: skip

    def show() -> None:
        show_report(rows[0])
        compared = ("speedup", "same_tokens") if compare else ()
        _table(rows, ("name", "tpot_ms", "comm_share", "memory_gb_per_s", "roofline_share", *compared))
        if compare:
            _rounds(rows)

    finish({"results": rows}, as_json, show)


@bench.command("prefill")
def bench_prefill(
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "auto",
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Dp = 1,
    ep: Ep = False,
    batch: Batch = 4,
    prompt: PromptTokens = 512,
    step: Annotated[int, typer.Option(help="tokens of one forward pass; a longer prompt is computed in pieces")] = 512,
    repeats: Repeats = 3,
    threads: Threads = None,
    link: LinkRate = None,
    overlap: Overlap = "none",
    compare: Annotated[bool, typer.Option(help="TP against PP, without a link and with it, taking turns")] = False,
    as_json: Json = False,
) -> None:
    """Prefill speed: seconds until all prompts have their first token, and the share that the machine's roofline allows."""
    from labkit.measure.bench import prefill

    rows = prefill(
        model, dtype=dtype, tp=tp, pp=pp, dp=dp, ep=ep, batch=batch, prompt=prompt, step=step, repeats=repeats,
        threads=threads, link=link, overlap=overlap, compare=compare,
    )  # fmt: skip
    columns = ("name", "seconds", "prompt_tokens_per_s", "tflops", "roofline_share", "same_tokens")
    finish({"results": rows}, as_json, lambda: _table(rows, columns))


@bench.command("pipeline")
def bench_pipeline(
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "auto",
    pp: Pp = 2,
    batch: Annotated[int, typer.Option(help="requests in flight on one rank, and for each stage of the pipeline")] = 8,
    prompt: Annotated[int, typer.Option("--prompt", help="tokens of each prompt in the prefill")] = 512,
    tokens: Annotated[int, typer.Option(help="tokens to generate for each request in decode")] = 32,
    step: Annotated[int, typer.Option(help="tokens of one forward pass in the prefill")] = 512,
    repeats: Repeats = 3,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """A pipeline against one rank: one request, as many requests on both, as many per stage, and prefill."""
    from labkit.measure.bench import pipeline

    rows = pipeline(
        model,
        dtype=dtype,
        pp=pp,
        batch=batch,
        prompt=prompt,
        tokens=tokens,
        step=step,
        repeats=repeats,
        threads=threads,
    )
    columns = ("name", "throughput", "gain", "tpot_ms", "bubble_fraction", "same_tokens")
    finish({"results": rows}, as_json, lambda: _table(rows, columns))


@bench.command("hosts")
def bench_hosts(
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "auto",
    tp: Tp = 2,
    pp: Pp = 2,
    batch: Batch = 1,
    prompt: PromptTokens = 128,
    tokens: Annotated[int, typer.Option(help="tokens to generate for each")] = 16,
    repeats: Repeats = 3,
    threads: Threads = None,
    link: Annotated[
        str | None, typer.Option(help="emulate hosts of tp ranks each, joined by this link, as 1gbit")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tensor-parallel groups inside hosts against groups across them: emulated hosts, or torchrun's own."""
    from labkit.measure.bench import hosts

    rows = hosts(
        model, dtype=dtype, tp=tp, pp=pp, batch=batch, prompt=prompt, tokens=tokens, repeats=repeats, threads=threads,
        link=link,
    )  # fmt: skip
    columns = ("name", "tpot_ms", "slowdown", "measured_bytes", "predicted_bytes", "same_tokens")
    finish({"results": rows}, as_json, lambda: _table(rows, columns))


@bench.command("overlap")
def bench_overlap(
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "auto",
    tp: Tp = 2,
    batch: Batch = 4,
    prompt: PromptTokens = 512,
    repeats: Repeats = 3,
    threads: Threads = None,
    link: Annotated[
        list[str] | None, typer.Option(help="links to try; by default four, found by a measurement")
    ] = None,
    as_json: Json = False,
) -> None:
    """What hiding communication behind computation gains in prefill, over links of several rates."""
    from labkit.measure.bench import overlap

    rows = overlap(
        model, dtype=dtype, tp=tp, batch=batch, prompt=prompt, repeats=repeats, threads=threads, links=link or ()
    )
    columns = ("overlap", "seconds", "comm_ms", "hidden_ms", "gain", "same_tokens")
    finish({"results": rows}, as_json, lambda: _table(rows, columns))


@bench.command("experts")
def bench_experts(
    model: ModelName = "tiny-moe",
    dtype: Dtype = "auto",
    tp: Tp = 1,
    dp: Dp = 2,
    batch: Batch = 8,
    prompt: PromptTokens = 512,
    tokens: Annotated[int, typer.Option(help="tokens to generate for each")] = 16,
    repeats: Repeats = 3,
    threads: Threads = None,
    link: LinkRate = None,
    text: Annotated[Path | None, typer.Option(help="take the prompts from this file (default: tiny-moe's own)")] = None,
    as_json: Json = False,
) -> None:
    """Expert parallelism over dp x tp: three exchanges and three placements against one rank, and TP inside the experts."""
    from labkit.measure.bench import experts

    rows = experts(
        model, dtype=dtype, tp=tp, dp=dp, batch=batch, prompt=prompt, tokens=tokens, repeats=repeats, threads=threads,
        link=link, text=text,
    )  # fmt: skip
    columns = ("name", "ttft_ms", "prefill_speedup", "tpot_ms", "decode_speedup", "exchange_bytes", "busiest_over_mean")
    finish({"results": rows}, as_json, lambda: _table(rows, columns))


@bench.command("serve")
def bench_serve(
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "auto",
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Dp = 1,
    ep: Ep = False,
    threads: Threads = None,
    max_num_seqs: MaxNumSeqs = 16,
    url: Annotated[str, typer.Option(help="load this server instead of starting one, as http://127.0.0.1:8000")] = "",
    rates: Annotated[str, typer.Option(help="requests per second, as 1,2,4 (default: by the measured capacity)")] = "",
    seconds: Annotated[float, typer.Option(help="how long requests come, at each rate")] = 20,
    prompt: Annotated[str, typer.Option(help="fewest and most prompt tokens of each")] = "16-128",
    output: Annotated[str, typer.Option(help="fewest and most tokens to generate for each")] = "16-64",
    seed: Annotated[int, typer.Option(help="of lengths, ids and arrivals")] = 0,
    plot: Annotated[Path | None, typer.Option(help="draw latency over throughput into this PNG file")] = None,
    as_json: Json = False,
) -> None:
    """Load `labkit serve` with requests that arrive at random, at several rates: throughput, and what users wait for."""
    from rich.table import Table

    from labkit.measure.serving import serve

    rows = serve(
        model, dtype=dtype, tp=tp, pp=pp, dp=dp, ep=ep, threads=threads, max_num_seqs=max_num_seqs, url=url,
        rates=[float(rate) for rate in rates.split(",") if rate], seconds=seconds, prompt=_range(prompt),
        output=_range(output), seed=seed,
    )  # fmt: skip
    if plot:
        from labkit.lab.plots import load

        load(rows).savefig(plot, dpi=110)

    def show() -> None:
        first = rows[0]
        low, high = first["prompt_tokens"]
        threads = f", {first['threads_per_rank']} thread(s) per rank" if first["threads_per_rank"] else ""
        print(f"{first['model']}, {first['name']}, {first['dtype']}{threads}; {first['hardware']}")
        print(f"{low} to {high} prompt tokens, {first['new_tokens'][0]} to {first['new_tokens'][1]} generated")
        figures = [f"{name}{part}_ms" for name in ("ttft", "tpot", "itl", "e2e") for part in ("", "_p95", "_p99")]
        names = ("requests", "achieved_per_s", "tokens_per_s", *figures, "queue_ms", "preemptions", "roofline_share")
        table = Table("requests/s", *(f"{row['rate']:.3g}" for row in rows))
        for name in names:
            table.add_row(name.replace("_", " "), *(cell(row[name]) for row in rows))
        console.print(table)
        if first["oversubscribed"]:
            print("oversubscribed: more ranks than devices, these times say little")

    finish({"results": rows}, as_json, show)


@bench.command("collectives")
def bench_collectives(
    ranks: Annotated[str, typer.Option(help="numbers of ranks, as 2,3,4")] = "2,3,4",
    ops: Annotated[
        str, typer.Option(help="operations, as all_reduce,ring,one-shot,two-shot (default: Comm's seven)")
    ] = "",
    largest: Annotated[int, typer.Option(help="largest message in bytes, from 256 on in powers of two")] = 2**26,
    link: LinkRate = None,
    csv: Annotated[Path | None, typer.Option(help="write all rows to this CSV file")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="draw all-reduce, or the first operation, into this PNG file")
    ] = None,
    seconds: Annotated[float, typer.Option(help="how long to repeat each point")] = 0.1,
    as_json: Json = False,
) -> None:
    """Every collective over message sizes, numbers of ranks and paths: latency, bandwidth, and a fit of both."""
    import pandas

    from labkit.measure.collectives import OPS, SIZES, fits, sweep
    from labkit.measure.machine import hardware

    chosen = ops.split(",") if ops else list(OPS)
    frame = sweep(
        [int(n) for n in ranks.split(",")], chosen, [s for s in SIZES if s <= largest], link=link, seconds=seconds
    )
    fitted = fits(frame)
    if csv:
        frame.to_csv(csv, index=False)
    if plot:
        from labkit.lab.plots import collectives

        collectives(frame[frame["op"] == chosen[0]]).savefig(plot, dpi=110)
    rows, lines = frame.to_dict("records"), fitted.to_dict("records")

    def show() -> None:
        times = frame.pivot_table(index="bytes", columns=["ranks", "path", "op"], values="median_us", sort=False)
        with pandas.option_context("display.width", None, "display.max_columns", None, "display.max_rows", None):
            print(f"median us, {hardware('cpu')}\n{times.round(1).T.to_string()}\n")
            print(f"t = alpha + bytes / beta, fitted on every other size\n{fitted.round(3).to_string(index=False)}")
        for text in sorted({row["link"] for row in rows if row["link"]}):
            print(f"link: {text}; measured {rows[0]['link_gbit_per_s']:.3g} Gbit/s")

    finish({"results": rows, "fits": lines}, as_json, show)


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """One line for each row, and before them what all have in common."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    said = [
        (
            row["model"],
            degrees(row),
            row["dtype"],
            f"{row['threads_per_rank']} thread(s) per rank",
            f"batch {row['batch']}",
            f"{row['prompt_tokens']} prompt tokens",
        )
        for row in rows
    ]
    common = [values[0] for values in zip(*said, strict=True) if len(set(values)) == 1]
    table = Table(title=f"{', '.join(common)}; {rows[0]['hardware']}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    linked = [row for row in rows if row.get("link")]
    cells = {name.replace("_", " "): [_with_range(row, name) for row in rows] for name in columns}
    asked = [row["link"]["asked_gbit_per_s"] if row.get("link") else None for row in rows]
    if len(set(asked)) > 1:
        cells["link, Gbit/s"] = list(map(cell, asked))
    for name, column in cells.items():  # as wide as their longest word, so that there is room for names
        width = max(len(word) for text in (name, *column) for word in text.split())
        table.add_column(name, min_width=width, max_width=None if name == "name" else width)
    for line in zip(*cells.values(), strict=True):
        table.add_row(*line)
    console.print(table)
    for text in sorted({row["link"]["label"] for row in linked}):
        rates = sorted(row["link"]["measured_gbit_per_s"] for row in linked if row["link"]["label"] == text)
        console.print(f"link: {text}; measured {cell(rates[0])} to {cell(rates[-1])} Gbit/s")


def _with_range(row: dict[str, Any], column: str) -> str:
    """A figure; of several times that a run took, the median and their range."""
    every = row[f"{column}_all"] if column in ("seconds", "tpot_ms") and row[column] is not None else []
    return cell(row[column]) + (f" ({cell(min(every))}-{cell(max(every))})" if len(every) > 1 else "")


def _rounds(rows: list[dict[str, Any]]) -> None:
    """What took turns, round by round, beside what memory gave to all and to one, where it gave most first: on a machine whose
    speed changes, this tells whether the speedup changes with it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    layout, one = rows[0], rows[-1]
    columns = {f"{row['name']}, ms": row["tpot_ms_all"] for row in rows}
    columns["speedup"] = [b / a for a, b in zip(layout["tpot_ms_all"], one["tpot_ms_all"], strict=True)]
    for row in (layout, one) if layout["memory_gb_per_s_all"] else ():
        columns[f"memory for {row['name']}, GB/s"] = row["memory_gb_per_s_all"]
    table = Table("round", *columns, title="round by round, by memory", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rounds = enumerate(zip(*columns.values(), strict=True), 1)
    memory = layout["memory_gb_per_s_all"] or [0.0] * len(layout["tpot_ms_all"])
    for number, values in sorted(rounds, key=lambda each: -memory[each[0] - 1]):
        table.add_row(str(number), *map(cell, values))
    console.print(table)


def _range(text: str) -> tuple[int, int]:
    """ "16-128", or "64" for no range."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)
