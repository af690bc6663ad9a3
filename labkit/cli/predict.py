"""Commands that need no GPU to say what one would do: `dryrun`, `predict`, `plan`."""

import sys
from statistics import median
from typing import Annotated, Any

import typer

from labkit.cli.common import (
    Batch,
    Dp,
    Dtype,
    Ep,
    ExpertExchange,
    ExpertPlacement,
    Json,
    Pp,
    RankOrder,
    Tp,
    degrees,
    finish,
    plain_table,
)

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
        print(f"{model}, {degrees(result)}, {result['dtype']}, {batch} x {context} tokens, {result['device']}")
        alike: dict[tuple[Any, ...], list[int]] = {}
        for rank in result["ranks"]:
            sizes = (f"{rank[name] / 1e9:.3f}" for name in ("weights_bytes", "kv_bytes", "peak_bytes"))
            alike.setdefault((rank["stage"], rank["layers"], *sizes), []).append(rank["rank"])
        columns = ("ranks", "stage", "layers", "weights GB", "KV GB", "peak GB")
        plain_table([dict(zip(columns, (_ranges(ranks), *kind), strict=True)) for kind, ranks in alike.items()])
        print("between ranks, on the busiest, per token:")
        plain_table(result["comm"])
        if result["hosts"] > 1:
            sent = result["between_hosts_bytes_per_token"]
            print(
                f"between {result['hosts']} hosts, per token: prefill {sent['prefill']:,.0f} bytes, decode {sent['decode']:,.0f}"
            )

    finish(result, as_json, show)


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
        print("what is not known of this machine yet is measured first: a minute or two a setting", file=sys.stderr)
    if validate and hardware == "local":
        rows = local.compared(model)
        errors = [abs(row["error"]) for row in rows]

        def show_rows() -> None:
            plain_table([{**row, "layout": degrees(row)} for row in rows])
            print(f"{len(rows)} rows, median error {median(errors):.1%}, worst {max(errors):.1%}")

        finish({"results": rows}, as_json, show_rows)
    if validate:
        from labkit.predict.calibrate import validation

        published = validation()

        def show_errors() -> None:
            print("relative errors of the cost model against published measurements (labkit.predict.calibrate):")
            for name, each in published.items():
                parts = {"": each} if "median" in each else {} if isinstance(each, list) else each
                for part, sizes in parts.items():
                    title = f"{name.replace('_', ' ')}{part and ': '}{part}"
                    print(
                        f"  {title:60} {sizes['rows']:4} rows, median {sizes['median']:6.1%}, worst {sizes['worst']:6.1%}"
                    )

        finish(published, as_json, show_errors)
    from labkit.predict.cost import predict as run

    result = run(
        model, hardware, tp=tp, pp=pp, dp=dp, ep=ep, batch=batch, context=context, dtype=dtype, kv_dtype=kv_dtype,
        engine_=engine, prompt=prompt, output=output, step=step, imbalance=imbalance,
    )  # fmt: skip

    def show() -> None:
        memory = result["memory"]
        print(f"{model} on {result['hardware']}, {degrees(result)}, {result['dtype']}, engine {result['engine']}")
        speed = f"TPOT {result['tpot_ms']:.2f} ms, {result['tokens_per_s']:,.0f} tokens/s"
        print(f"{batch} sequences of {result['context']} tokens: {speed}")
        print(f"a prompt of {result['prompt']} tokens alone: TTFT {result['ttft_ms']:.1f} ms")
        print(
            f"a GPU holds {memory['weights_gb']:.1f} GB of weights, {memory['kv_gb']:.1f} of KV cache, about "
            f"{memory['activations_gb']:.1f} of activations: {'fits' if memory['fits'] else 'does not fit'} in "
            f"{memory['usable_gb']:.1f} GB; it sends {result['comm_bytes_per_token']:,.0f} bytes per token"
        )
        plain_table(result["terms"])
        for name, source in result["sources"].items():
            print(f"{name}: {source}")

    finish(result, as_json, show)


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
            plain_table(
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


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
