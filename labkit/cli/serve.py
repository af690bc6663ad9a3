"""Commands that serve a model, and `doctor`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from labkit.cli.common import (
    Dp,
    Dtype,
    Ep,
    ExpertExchange,
    ExpertPlacement,
    Json,
    LinkRate,
    MaxNumSeqs,
    ModelName,
    Overlap,
    Pp,
    RankOrder,
    Threads,
    Tp,
    console,
    degrees,
    finish,
    show_report,
)
from labkit.launch import in_torchrun, prepare

SharedMemory = Annotated[
    bool, typer.Option("--shared-memory/--sockets", help="between ranks of one host: shared memory where it is there")
]
Seed = Annotated[int, typer.Option("--seed", help="seed of noise, and of random weights")]


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
    if not in_torchrun():
        prepare()
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
        show_report(report)

    finish(result, as_json, show)


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
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching", help="compute once what prompts begin with alike, as a conversation so far"
        ),
    ] = False,
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
    prepare()
    from labkit.engine.llm import LLM
    from labkit.serve.server import run

    def ready(url: str, llm: LLM) -> None:
        report = llm.report()
        if as_json:
            print(json.dumps({"url": url, "model": llm.model.name, "layout": report["layout"]}), flush=True)
        else:
            print(f"{llm.model.name}, {degrees(report)}, {report['dtype']}: {url}/v1 (Ctrl-C ends it)", flush=True)

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
        enable_prefix_caching=enable_prefix_caching,
        seed=seed,
        threads=threads,
        link=link,
        restart=restart,
    )
