"""`labkit ...`: the command line. It reads arguments, calls the library, prints; nothing is computed here.

Each command takes --json (one JSON object on stdout and nothing else) and exits with 0, 1 (it failed) or 2 (wrong usage).
Heavy imports wait until a command needs them, so that `labkit --help` answers at once.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="The Model Parallelism Lab: serve one language model from several devices, and measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(help="Measured figures on a given layout: medians and spread.", no_args_is_help=True)
app.add_typer(bench, name="bench")
launch = typer.Typer(
    help="Several machines: rehearse on emulated ones, or print what starts real ones.", no_args_is_help=True
)
app.add_typer(launch, name="launch")
console = Console()

ModelName = Annotated[
    str, typer.Option("--model", help="smollm2-135m, tiny-moe, a folder, a .gguf file, random:NAME, or a Hub id")
]
ShapeName = Annotated[
    str, typer.Option("--model", help="a registered shape (llama-3.1-70b, gpt-3-175b, ...), a config.json, or a model")
]
HardwareSpec = Annotated[
    str,
    typer.Option(
        help="h100-sxm, a100-80gb, ..., a .json file, or values: h100-sxm,link_gbs=100; links are per direction"
    ),
]
PromptLength = Annotated[int | None, typer.Option("--prompt", help="tokens of each prompt (default: the context)")]
OutputLength = Annotated[
    int | None,
    typer.Option("--output", help="tokens of each answer, for a server that always has --batch requests in flight"),
]
PrefillStep = Annotated[int, typer.Option("--step", help="prompt tokens of one forward pass")]
KvPrecision = Annotated[str, typer.Option("--kv-dtype", help="of the KV cache: auto, float32, bfloat16, float16, fp8")]
EngineName = Annotated[str, typer.Option(help="whose efficiency: typical, vllm, sglang, tensorrt-llm, gpt-fast")]
Precision = Annotated[str, typer.Option("--dtype", help="of weights: auto, bfloat16, fp8, int8, int4, ...")]
Context = Annotated[int, typer.Option(help="tokens of each sequence at its end")]
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
SharedMemory = Annotated[
    bool, typer.Option("--shared-memory/--sockets", help="between ranks of one host: shared memory where it is there")
]
LaunchedCommand = Annotated[list[str], typer.Argument(help="a command of labkit and its options, after --")]
Nodes = Annotated[int, typer.Option(help="how many machines")]
GpusPerNode = Annotated[int, typer.Option(help="GPUs of each, with a rank each")]
CpusPerNode = Annotated[int, typer.Option(help="CPUs of each, with a rank each where there are no GPUs")]
JobName = Annotated[str, typer.Option("--name", help="of the job")]
Batch = Annotated[int, typer.Option(help="sequences at once")]
MaxNumSeqs = Annotated[int, typer.Option(help="sequences in flight at once, on each replica")]
PromptTokens = Annotated[int, typer.Option("--prompt", help="prompt tokens of each")]
Repeats = Annotated[int, typer.Option(help="measured runs, after one to warm up")]
Seed = Annotated[int, typer.Option("--seed", help="seed of noise, and of random weights")]
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


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: Python, torch, backends, cores, GPUs, a two-rank ping, disk, the default model."""
    from labkit.measure.doctor import examine

    result = examine()

    def show() -> None:
        for check in result["checks"]:
            mark = "[green]\\[OK][/]" if check["ok"] else "[red]\\[FAIL][/]"
            console.print(f"{mark} {check['name']}: {check['detail']}")
            if not check["ok"]:
                console.print(f"       mend: {check['mend']}")

    finish(result, as_json, show, ok=all(check["ok"] for check in result["checks"]))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "auto",
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Dp = 1,
    ep: Ep = False,
    rank_order: RankOrder = "dp-pp-tp",
    expert_exchange: ExpertExchange = "all_to_all",
    expert_placement: ExpertPlacement = "contiguous",
    max_tokens: Annotated[int, typer.Option(help="generate at most this many tokens")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    threads: Threads = None,
    link: LinkRate = None,
    overlap: Overlap = "none",
    shared_memory: SharedMemory = True,
    trace: Annotated[
        Path | None, typer.Option(help="write what each rank did to this file, for ui.perfetto.dev")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a model over tp x pp x dp ranks and generate text. Also runs under torchrun, on one machine or several
    (`labkit launch --help`), where rank 0 prints."""
    from labkit import LLM, SamplingParams

    llm = LLM(
        model,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        enable_expert_parallel=ep,
        rank_order=rank_order,
        expert_exchange=expert_exchange,
        expert_placement=expert_placement,
        dtype=dtype,
        seed=seed,
        threads=threads,
        link=link,
        overlap=overlap,
        shared_memory=shared_memory,
        trace=trace is not None,
    )
    with llm:
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
        asked = llm.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
        output = llm.generate(asked, params)[0].outputs[0]
        report = llm.report()
    if trace and llm.leads:
        from labkit.measure.trace import chrome, spans

        trace.write_text(json.dumps(chrome(spans(llm.trace(), llm.layout))))
    result = {"text": output.text, "token_ids": output.token_ids, "layout": report["layout"], "report": report}

    def show() -> None:
        print(output.text + "\n")
        _show(report)

    finish(result, as_json, show)


@app.command()
def serve(
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "auto",
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Dp = 1,
    ep: Ep = False,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at; 0 takes a free one")] = 8000,
    max_model_len: Annotated[int, typer.Option(help="longest prompt plus output, in tokens")] = 2048,
    max_num_seqs: MaxNumSeqs = 16,
    max_num_batched_tokens: Annotated[int, typer.Option(help="tokens of one step")] = 4096,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="room in the KV cache of each replica")] = None,
    seed: Seed = 0,
    threads: Threads = None,
    link: LinkRate = None,
    restart: Annotated[bool, typer.Option(help="replace ranks that fail; clients only wait longer")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="when ready, print one JSON object: url, model, layout")
    ] = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API, over tp x pp x dp ranks, until Ctrl-C.

    POST /v1/completions and /v1/chat/completions, GET /v1/models, /health and /metrics (for Prometheus). Any OpenAI client
    works: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").
    """
    from labkit.engine.llm import LLM
    from labkit.serve.server import run

    def ready(url: str, llm: LLM) -> None:
        report = llm.report()
        if as_json:
            print(json.dumps({"url": url, "model": llm.model.name, "layout": report["layout"]}), flush=True)
        else:
            print(f"{llm.model.name}, {_degrees(report)}, {report['dtype']}: {url}/v1 (Ctrl-C ends it)", flush=True)

    run(
        model,
        host=host,
        port=port,
        ready=ready,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        enable_expert_parallel=ep,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_tokens=kv_cache_tokens,
        seed=seed,
        threads=threads,
        link=link,
        restart=restart,
    )


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
    compare: Annotated[bool, typer.Option(help="also through sockets alone, and one rank, taking turns")] = False,
    as_json: Json = False,
) -> None:
    """Decode speed: time per output token, tokens/s, and the part of it spent in communication."""
    from labkit.measure.bench import decode

    rows = decode(
        model, dtype=dtype, tp=tp, pp=pp, dp=dp, ep=ep, batch=batch, prompt=prompt, tokens=tokens, repeats=repeats,
        threads=threads, link=link, compare=compare,
    )  # fmt: skip

    def show() -> None:
        _show(rows[0])
        if compare:
            _table(rows, ("name", "tpot_ms", "comm_share", "weights_gb_per_s", "speedup", "same_tokens"))

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
    """Prefill speed: seconds until all prompts have their first token."""
    from labkit.measure.bench import prefill

    rows = prefill(
        model, dtype=dtype, tp=tp, pp=pp, dp=dp, ep=ep, batch=batch, prompt=prompt, step=step, repeats=repeats,
        threads=threads, link=link, overlap=overlap, compare=compare,
    )  # fmt: skip
    finish({"results": rows}, as_json, lambda: _table(rows, ("name", "seconds", "prompt_tokens_per_s", "same_tokens")))


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
    columns = ("name", "batch", "throughput", "gain", "tpot_ms", "bubble_fraction", "same_tokens")
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
        print(f"{first['model']}, {first['name']}, {first['dtype']}; {first['hardware']}")
        print(f"{low} to {high} prompt tokens, {first['new_tokens'][0]} to {first['new_tokens'][1]} generated")
        figures = [f"{name}{part}_ms" for name in ("ttft", "tpot", "itl", "e2e") for part in ("", "_p95", "_p99")]
        names = ("requests", "achieved_per_s", "tokens_per_s", *figures, "queue_ms", "preemptions")
        table = Table("requests/s", *(f"{row['rate']:.3g}" for row in rows))
        for name in names:
            table.add_row(name.replace("_", " "), *(_cell(row[name]) for row in rows))
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


@app.command()
def dryrun(
    model: ShapeName = "llama-3.1-70b",
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Dp = 1,
    ep: Ep = False,
    batch: Batch = 1,
    context: Context = 2048,
    dtype: Dtype = "auto",
    step: PrefillStep = 4096,
    rank_order: RankOrder = "dp-pp-tp",
    ranks_per_host: Annotated[int | None, typer.Option(help="so many ranks are on one host (default: all)")] = None,
    expert_exchange: ExpertExchange = "all_to_all",
    expert_placement: ExpertPlacement = "contiguous",
    device: Annotated[str, typer.Option(help="of the fake tensors: cuda or cpu")] = "cuda",
    as_json: Json = False,
) -> None:
    """The engine on fake devices: bytes of each rank, operations and bytes of each token, for models no machine here holds."""
    from labkit.predict.dryrun import dryrun as run

    result = run(
        model, tp=tp, pp=pp, dp=dp, ep=ep, batch=batch, context=context, dtype=dtype, step=step, device=device,
        exchange=expert_exchange, placement=expert_placement, rank_order=rank_order, ranks_per_host=ranks_per_host,
    )  # fmt: skip

    def show() -> None:
        print(f"{model}, {_degrees(result)}, {result['dtype']}, {batch} x {context} tokens, {result['device']}")
        alike: dict[tuple[Any, ...], list[int]] = {}
        for rank in result["ranks"]:
            sizes = (f"{rank[name] / 1e9:.3f}" for name in ("weights_bytes", "kv_bytes", "peak_bytes"))
            alike.setdefault((rank["stage"], rank["layers"], *sizes), []).append(rank["rank"])
        columns = ("ranks", "stage", "layers", "weights GB", "KV GB", "peak GB")
        _plain_table([dict(zip(columns, (_ranges(ranks), *kind), strict=True)) for kind, ranks in alike.items()])
        print("between ranks, on the busiest, per token:")
        _plain_table(result["comm"])
        if result["hosts"] > 1:
            sent = result["between_hosts_bytes_per_token"]
            print(
                f"between {result['hosts']} hosts, per token: prefill {sent['prefill']:,.0f} bytes, decode {sent['decode']:,.0f}"
            )

    finish(result, as_json, show)


@app.command()
def predict(
    model: ShapeName = "llama-3.1-70b",
    hardware: HardwareSpec = "h100-sxm",
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Dp = 1,
    ep: Ep = False,
    batch: Batch = 1,
    context: Context = 2048,
    dtype: Precision = "auto",
    kv_dtype: KvPrecision = "auto",
    engine: EngineName = "typical",
    prompt: PromptLength = None,
    output: OutputLength = None,
    step: PrefillStep = 8192,
    imbalance: Annotated[float | None, typer.Option(help="load of the busiest expert rank over the mean")] = None,
    validate: Annotated[
        bool,
        typer.Option(
            help="errors against published measurements, fitted and held out; with --hardware local, measured here"
        ),
    ] = False,
    recalibrate: Annotated[bool, typer.Option(help="measure this machine again (--hardware local)")] = False,
    as_json: Json = False,
) -> None:
    """Time per token, time to the first, memory and communication of a deployment, as sums of terms with their sources."""
    if hardware == "local":
        from labkit.predict import local

        if recalibrate:
            local.forget()
        print("what is not known of this machine yet is measured first, some 30 s a setting", file=sys.stderr)
    if validate and hardware == "local":
        rows = local.compared(model)
        finish({"results": rows}, as_json, lambda: _plain_table([{**row, "layout": _degrees(row)} for row in rows]))
    if validate:
        from labkit.predict.calibrate import validation

        errors = validation()

        def show_errors() -> None:
            print("relative errors of the cost model against published measurements (labkit.predict.calibrate):")
            for name, each in errors.items():
                parts = {"": each} if "median" in each else {} if isinstance(each, list) else each
                for part, sizes in parts.items():
                    title = f"{name.replace('_', ' ')}{part and ': '}{part}"
                    print(
                        f"  {title:60} {sizes['rows']:4} rows, median {sizes['median']:6.1%}, worst {sizes['worst']:6.1%}"
                    )

        finish(errors, as_json, show_errors)
    from labkit.predict.cost import predict as run

    result = run(
        model, hardware, tp=tp, pp=pp, dp=dp, ep=ep, batch=batch, context=context, dtype=dtype, kv_dtype=kv_dtype,
        engine_=engine, prompt=prompt, output=output, step=step, imbalance=imbalance,
    )  # fmt: skip

    def show() -> None:
        memory = result["memory"]
        print(f"{model} on {result['hardware']}, {_degrees(result)}, {result['dtype']}, engine {result['engine']}")
        speed = f"TPOT {result['tpot_ms']:.2f} ms, {result['tokens_per_s']:,.0f} tokens/s"
        print(f"{batch} sequences of {result['context']} tokens: {speed}")
        print(f"a prompt of {result['prompt']} tokens alone: TTFT {result['ttft_ms']:.1f} ms")
        print(
            f"a GPU holds {memory['weights_gb']:.1f} GB of weights, {memory['kv_gb']:.1f} of KV cache, about "
            f"{memory['activations_gb']:.1f} of activations: {'fits' if memory['fits'] else 'does not fit'} in "
            f"{memory['usable_gb']:.1f} GB; it sends {result['comm_bytes_per_token']:,.0f} bytes per token"
        )
        _plain_table(result["terms"])
        for name, source in result["sources"].items():
            print(f"{name}: {source}")

    finish(result, as_json, show)


@app.command()
def plan(
    gpus: Annotated[int, typer.Option(help="how many there are")],
    model: ShapeName = "llama-3.1-70b",
    hardware: HardwareSpec = "h100-sxm",
    context: Context = 2048,
    batch: Annotated[int, typer.Option(help="sequences in flight, in all replicas together")] = 1,
    rate: Annotated[float | None, typer.Option(help="requests per second, instead of --batch; needs --output")] = None,
    objective: Annotated[
        str, typer.Option(help="latency (time per token) or throughput (with a full memory)")
    ] = "latency",
    dtype: Precision = "auto",
    kv_dtype: KvPrecision = "auto",
    engine: EngineName = "typical",
    prompt: PromptLength = None,
    output: OutputLength = None,
    step: PrefillStep = 8192,
    as_json: Json = False,
) -> None:
    """Every layout of a model on some GPUs: what does not fit and why, what is best and why, and commands that launch it."""
    from labkit.predict.plan import plan as run
    from labkit.predict.plan import words

    result = run(
        model, hardware, gpus=gpus, context=context, batch=batch, rate=rate, objective=objective, dtype=dtype,
        kv_dtype=kv_dtype, engine_=engine, prompt=prompt, output=output, step=step,
    )  # fmt: skip

    def show() -> None:
        usable = result["usable_gb_per_gpu"]
        print(
            f"{model} on {gpus} x {result['hardware']}, {result['dtype']}, {usable:.1f} GB usable each, for {objective}"
        )
        columns = ("memory_gb_per_gpu", "tpot_ms", "ttft_ms", "tokens_per_s", "max_batch", "max_tokens_per_s")
        fitting = [row for row in result["layouts"] if row["fits"]]
        if fitting:
            _plain_table(
                [
                    {
                        "layout": words(row["layout"]),
                        **{name: row[name] for name in columns},
                        "Pareto": "*" * row["pareto"],
                    }
                    for row in fitting
                ]
            )
        for row in result["layouts"]:
            print(f"{words(row['layout'])}{'' if row['fits'] else ' does not fit'}: {row['reason']}")
        for program, line in (result["recommended"] or {"commands": {}})["commands"].items():
            print(f"\n{program}:\n{line}")

    finish(result, as_json, show, ok=result["recommended"] is not None)


@launch.command("hosts")
def launch_hosts(
    command: LaunchedCommand,
    nodes: Nodes = 2,
    per_node: Annotated[int, typer.Option(help="ranks on each host")] = 2,
    link: Annotated[str, typer.Option(help="rate of each host's link, as 1gbit")] = "10gbit",
) -> None:
    """Run a command of labkit on hosts emulated on this machine, as it would run on real ones.

    labkit launch hosts --nodes 2 --per-node 2 --link 1gbit -- generate "The tide" --tp 2 --pp 2
    """
    from labkit.launch.cluster import on_emulated_hosts

    raise typer.Exit(min(1, on_emulated_hosts(["-m", "labkit", *command], nodes=nodes, per_node=per_node, link=link)))


@launch.command("slurm")
def launch_slurm(
    command: LaunchedCommand,
    nodes: Nodes = 2,
    gpus_per_node: GpusPerNode = 0,
    cpus_per_node: CpusPerNode = 0,
    name: JobName = "labkit",
    time: Annotated[str, typer.Option(help="at most, as hours:minutes:seconds")] = "01:00:00",
    python: Annotated[str, typer.Option(help="the interpreter on the nodes")] = sys.executable,
) -> None:
    """Print a batch file that runs a command of labkit over several nodes, for sbatch.

    labkit launch slurm --nodes 2 --gpus-per-node 8 -- generate "The tide" --tp 8 --pp 2 > job.sh && sbatch job.sh
    """
    from labkit.launch.cluster import Cluster, slurm

    cluster = Cluster(nodes, gpus_per_node, cpus_per_node, name)
    print(slurm(command, cluster, time=time, python=python), end="")


@launch.command("kubernetes")
def launch_kubernetes(
    command: LaunchedCommand,
    image: Annotated[str, typer.Option(help="container image with labkit installed")],
    nodes: Nodes = 2,
    gpus_per_node: GpusPerNode = 0,
    cpus_per_node: CpusPerNode = 0,
    name: JobName = "labkit",
    python: Annotated[str, typer.Option(help="the interpreter in the image")] = "python",
) -> None:
    """Print an indexed Job that runs a command of labkit over several nodes, for kubectl apply.

    labkit launch kubernetes --nodes 2 --gpus-per-node 8 --image IMAGE -- generate "The tide" --tp 8 --pp 2 | kubectl apply -f -
    """
    from labkit.launch.cluster import Cluster, kubernetes

    cluster = Cluster(nodes, gpus_per_node, cpus_per_node, name)
    print(kubernetes(command, cluster, image=image, python=python), end="")


@app.command()
def lessons(
    names: Annotated[
        list[str] | None, typer.Argument(help="lessons, e.g. 03 or 03_tensor_parallel (default: all)")
    ] = None,
    profile: Annotated[str, typer.Option(help="ci (short), laptop, or gpu")] = "ci",
    out: Annotated[Path, typer.Option(help="where executed notebooks go")] = Path("build/lessons"),
    as_json: Json = False,
) -> None:
    """Run the lessons, measured, and grade them; a table of status, time and grade."""
    from labkit.lab import lessons as runner

    rows = runner.run_lessons(names or [], profile, out)
    ok = all(row["status"] == "passed" for row in rows)
    finish({"lessons": rows}, as_json, lambda: console.print(runner.table(rows)), ok=ok)


@app.command()
def grade(
    paths: Annotated[list[Path], typer.Argument(help="exercise notebooks, or folders of them")],
    csv: Annotated[Path | None, typer.Option(help="also write a CSV file")] = None,
    as_json: Json = False,
) -> None:
    """Run exercise notebooks and grade them. Exit 0 means that they could be graded, whatever the grade."""
    from labkit.lab import grade as grader

    result = grader.grade(paths, csv)
    finish(result, as_json, lambda: console.print(grader.table(result)))


@app.command()
def lab(port: Annotated[int, typer.Option(help="port on this machine; 0 takes a free one")] = 8888) -> None:
    """Open JupyterLab on the lessons (on loopback only)."""
    import subprocess

    raise typer.Exit(
        subprocess.call([sys.executable, "-m", "jupyterlab", f"--port={port}", "--ip=127.0.0.1", "notebooks"])
    )


def _range(text: str) -> tuple[int, int]:
    """ "16-128", or "64" for no range."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """One line for each row, and before them what all have in common."""
    from rich.table import Table

    said = [
        (row["model"], _degrees(row), row["dtype"], f"batch {row['batch']}", f"{row['prompt_tokens']} prompt tokens")
        for row in rows
    ]
    common = [values[0] for values in zip(*said, strict=True) if len(set(values)) == 1]
    table = Table(title=f"{', '.join(common)}; {rows[0]['hardware']}")
    linked = [row for row in rows if row.get("link")]
    for name in (*columns, *(("link: Gbit/s asked, measured",) if linked else ())):
        table.add_column(name.replace("_", " "), no_wrap=name == "name")
    for row in rows:
        link = row.get("link")
        rates = (
            [f"{link['asked_gbit_per_s']:.3g}, {link['measured_gbit_per_s']:.3g}" if link else "-"] if linked else []
        )
        table.add_row(*(_cell(row[c]) for c in columns), *rates)
    console.print(table)
    for text in sorted({row["link"]["label"] for row in linked}):
        console.print(f"link: {text}")


def _plain_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console.print(table)


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _degrees(report: dict[str, Any]) -> str:
    """The layout in words."""
    return " x ".join(f"{k}={v}" for k, v in report["layout"].items() if v > 1) or (
        "one rank" if report["layout"] else "unknown layout"
    )


def _show(report: dict[str, Any]) -> None:
    """A report in five lines."""
    ranks = report["ranks"]
    calls = sum(c["calls_per_token"] for c in report["comm"] if c["phase"] == "decode")
    comm_ms = max(rank["decode_comm_ms_per_token"] for rank in ranks)
    tpot = "" if report["tpot_ms"] is None else f", TPOT {report['tpot_ms']:.1f} ms"
    lines = {
        "layout": f"{_degrees(report)}, {report['dtype']}, {report['backend']}, {report['threads_per_rank']} thread(s) per rank",
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


def main() -> None:
    """Runs the command. What the user can mend is one line on stderr, without a traceback: exit 2 for a value that can't
    be used, 1 for a model or a rank that failed."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        from labkit.launch.local import RankError
        from labkit.links import LinkError
        from labkit.model.errors import ModelError

        if not isinstance(error, ValueError | RankError | LinkError | OSError):
            raise
        print(f"labkit: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) and not isinstance(error, ModelError) else 1) from None
