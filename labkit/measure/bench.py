"""Timed runs of the engine: medians and spread over repeats, never a single figure; what is compared takes turns.

On a shared machine speed changes from minute to minute: compare rows of one call, not of two.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from labkit.engine.llm import LLM
from labkit.engine.requests import SamplingParams
from labkit.launch.local import in_torchrun, threads_per_rank
from labkit.links import Link
from labkit.measure import roofline
from labkit.model.find import TINY_MOE, find
from labkit.parallel.expert import EXCHANGES
from labkit.parallel.overlap import MODES
from labkit.predict.dryrun import dryrun
from labkit.split import experts_by_load

Row = dict[str, Any]


def in_turns(
    model: str, variants: Mapping[str, Mapping[str, Any]], *, batch: int, prompt: int, tokens: int, repeats: int,
    prompts: list[list[int]] | None = None, **shared: Any,
) -> list[Row]:  # fmt: skip
    """Serves the same `batch` prompts of `prompt` tokens, `tokens` generated for each, with each variant in turn.

    Args:
        variants: by name, arguments of `LLM`; also `batch`, for a variant that serves another number of prompts, and `sampling`,
            arguments of `SamplingParams` (greedy by default). shared: those that all have in common.
        prompts: the token ids, random ones by default.
        repeats: rounds that count, after one to warm up.

    Returns a row for each variant: the report (`LLM.report`) of its median run, by TPOT or, for one token, by time, with
    `name`, `seconds`, the workload, and `same_tokens`: whether it generated what the first did, for the prompts that both
    served. `seconds_all`, `tpot_ms_all` and `ttft_ms_all`: of each round, in their order. What all its cores or GPUs reach
    together, measured in each round (not under torchrun, then None): `memory_gb_per_s`, in all rounds `memory_gb_per_s_all`,
    and of products `tflops`; `roofline_share`: the least time that a step of decode, or for one token all the prefill, takes
    with that, over the time that it took.
    """
    if min(batch, prompt, tokens, repeats) < 1:
        raise ValueError(f"batch={batch}, prompt={prompt}, tokens={tokens}, repeats={repeats}: use 1 or more")
    batches = {name: arguments.get("batch", batch) for name, arguments in variants.items()}
    common = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}
    params = {name: SamplingParams(**common | arguments.get("sampling", {})) for name, arguments in variants.items()}
    llms: dict[str, LLM] = {}
    runs: dict[str, list[Row]] = {name: [] for name in variants}
    ids: dict[str, list[list[int]]] = {}
    roofs: dict[tuple[str, int, str], list[roofline.Roof]] = {}  # by what computes together
    try:
        for name, arguments in variants.items():
            own = {key: value for key, value in arguments.items() if key not in ("batch", "sampling")}
            llms[name] = LLM(
                model, **{"max_model_len": prompt + tokens, "max_num_seqs": batches[name], **shared, **own}
            )
        vocab = next(iter(llms.values())).model.config.vocab
        if prompts is None:
            size = (max(batches.values()), prompt)
            prompts = torch.randint(0, vocab, size, generator=torch.Generator().manual_seed(0)).tolist()
        for turn in range(repeats + 1):
            for name, llm in llms.items():
                outputs = llm.generate(prompts[: batches[name]], params[name])
                ids[name] = [output.outputs[0].token_ids for output in outputs]
                report = llm.report()
                runs[name].append(report | {"seconds": batches[name] * tokens / report["tokens_per_s"]})
                workers = roofline.workers(report)
                measured = roofs.setdefault(workers, [])
                if not in_torchrun() and len(measured) == turn:  # at once: the next one's turn may last seconds
                    measured.append(roofline.measure(*workers))
    finally:
        for llm in llms.values():
            llm.close()
    rows = []
    first = ids[next(iter(ids))]
    for name, reports in runs.items():
        both = min(batches[name], len(first))
        ranked = sorted(reports[1:], key=lambda r: r["tpot_ms"] or r["seconds"])
        rows.append(ranked[(len(ranked) - 1) // 2] | {
            "name": name, "model": model, "batch": batches[name], "prompt_tokens": prompt, "new_tokens": tokens,
            "repeats": repeats, "same_tokens": ids[name][:both] == first[:both],
        } | {f"{field}_all": [r[field] for r in reports[1:]] for field in ("seconds", "tpot_ms", "ttft_ms")})  # fmt: skip
        rows[-1] |= _under(rows[-1], roofs[roofline.workers(rows[-1])][1:])
    return rows


def speedup(row: Row, over: Row, field: str = "tpot_ms") -> float:
    """How many times as fast as a row that took turns with it, in the median of the rounds.

    Within a round the machine changes less than between two rounds, so this is steadier than the ratio of two medians."""
    return median(theirs / ours for theirs, ours in zip(over[f"{field}_all"], row[f"{field}_all"], strict=True))


def _under(row: Row, roofs: Sequence[roofline.Roof]) -> Row:
    """The roof, in the median of the rounds, and the row's share of it."""
    if not roofs:
        return dict.fromkeys(("memory_gb_per_s", "memory_gb_per_s_all", "tflops", "roofline_share"))
    memory = [r.memory_gb_per_s for r in roofs]
    roof = roofline.Roof(median(memory), median(r.tflops for r in roofs))
    layout, batch, prompt, new = row["layout"], row["batch"], row["prompt_tokens"], row["new_tokens"]
    replicas = 1 if layout["ep"] > 1 else layout["dp"]  # that read the weights each for itself
    if new > 1:
        passes, tokens, took = min(batch, replicas * layout["pp"]), batch, row["tpot_ms"] / 1e3
        kv = pairs = batch * (prompt + new / 2)
    else:
        passes, tokens, took = replicas * row["ranks"][0]["prefill_steps"], batch * prompt, row["seconds"]
        kv, pairs = 0, batch * prompt**2 / 2
    least = roof.seconds(row["model"], row["dtype"], passes, tokens=tokens, sequences=batch, kv_tokens=kv, pairs=pairs)
    return {
        "memory_gb_per_s": roof.memory_gb_per_s, "memory_gb_per_s_all": memory, "tflops": roof.tflops,
        "roofline_share": least / took,
    }  # fmt: skip


def decode(
    model: str, *, dtype: str = "auto", tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False, batch: int = 1,
    prompt: int = 32, tokens: int = 64, repeats: int = 5, threads: int | None = None, link: str | None = None,
    enforce_eager: bool = False, temperature: float = 0.0, top_p: float = 1.0, compare: bool = False,
) -> list[Row]:  # fmt: skip
    """Decode speed of a layout; on GPUs without CUDA graphs if `enforce_eager`. With a `temperature` a second row, which took
    turns, of greedy decoding. With `compare` two more: the same through sockets alone, and one rank with as many threads as one
    of the layout's; each with `speedup` over that one rank.

    Rows are `in_turns`'s, with `weights_gb_per_s`: bytes of weights read per decode step over the TPOT, in GB/s on all ranks
    together (compare it with `memory_gb_per_s`: batch 1 decode is bound by it), and `comm_share`: the part of
    the TPOT that the rank which waits most spends in communication, waiting included.
    """
    if tokens < 2:
        raise ValueError(f"tokens={tokens}: use 2 or more")
    layout = {
        "tensor_parallel_size": tp, "pipeline_parallel_size": pp, "data_parallel_size": dp, "enable_expert_parallel": ep,
        "link": link,
    }  # fmt: skip
    sampling = {"sampling": {"temperature": temperature, "top_p": top_p, "seed": 0}}
    variants: dict[str, dict[str, Any]] = {"layout": layout | sampling}
    if temperature:
        variants |= {"greedy": layout}
    if compare:
        variants |= {"sockets alone": layout | sampling | {"shared_memory": False}, "one rank": sampling}
    if threads is None and compare:
        threads = threads_per_rank(tp * pp * dp)
    rows = in_turns(
        model, variants, batch=batch, prompt=prompt, tokens=tokens, repeats=repeats, dtype=dtype, threads=threads,
        enforce_eager=enforce_eager,
    )  # fmt: skip
    for row in rows:
        weights = sum(rank["weights_bytes"] for rank in row["ranks"])
        row["weights_gb_per_s"] = weights / row["tpot_ms"] / 1e6
        row["comm_share"] = max(r["decode_comm_ms_per_token"] for r in row["ranks"]) * batch / row["tpot_ms"]
        row["speedup"] = speedup(row, rows[-1]) if compare else None
    return rows


def prefill(
    model: str, *, dtype: str = "auto", tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False, batch: int = 4,
    prompt: int = 512, step: int = 512, repeats: int = 3, threads: int | None = None, link: str | None = None,
    overlap: str = "none", compare: bool = False,
) -> list[Row]:  # fmt: skip
    """Time to the first token of all prompts. With `compare` four rows that took turns: as many ranks along "tp" as along "pp",
    each without a link and with it.

    step: tokens of one forward pass; a pipeline fills up with several. Rows are `in_turns`'s, with
    `prompt_tokens_per_s`.
    """
    common = {"data_parallel_size": dp, "enable_expert_parallel": ep, "overlap": overlap}
    here = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "link": link} | common
    variants: dict[str, dict[str, Any]] = {"layout": here}
    if compare:
        if link is None or (tp > 1) == (pp > 1):
            raise ValueError("to compare, give a link, and a degree of 2 or more to one of tp and pp")
        n = max(tp, pp)
        shapes = {f"TP={n}": {"tensor_parallel_size": n}, f"PP={n}": {"pipeline_parallel_size": n}}
        variants = {
            f"{name}, {at or 'no link'}": shape | common | {"link": at}
            for at in (None, link) for name, shape in shapes.items()
        }  # fmt: skip
    rows = in_turns(
        model, variants, batch=batch, prompt=prompt, tokens=1, repeats=repeats, dtype=dtype, threads=threads,
        max_num_batched_tokens=step,
    )  # fmt: skip
    for row in rows:
        row["prompt_tokens_per_s"] = batch * prompt / row["seconds"]
    return rows


def pipeline(
    model: str, *, dtype: str = "auto", pp: int = 2, batch: int = 8, prompt: int = 512, tokens: int = 32, step: int = 512,
    repeats: int = 3, threads: int | None = None,
) -> list[Row]:  # fmt: skip
    """A pipeline and one rank, with as many threads as one of its stages, take turns under five loads.

    Decode, `tokens` for each request behind a prompt of 32: one request alone; `batch` of them; `batch` for each stage, against
    `batch` on one rank; 8 x `batch`. Prefill: `batch` prompts of `prompt` tokens, `step` of them in a forward pass.

    Rows are `in_turns`'s, two for each load, with `load`, `throughput` (decode: tokens/s of all requests while they decode,
    batch / TPOT; prefill: prompt tokens/s) and `gain`, its ratio to that of the one rank in the median of the rounds.
    """
    if pp < 2 or tokens < 2:
        raise ValueError(f"pp={pp}, tokens={tokens}: use 2 or more")
    threads = threads or threads_per_rank(pp)
    loads = {  # requests on one rank, requests in the pipeline, tokens of each prompt, new ones
        "1 in flight": (1, 1, 32, tokens),
        f"{batch} in flight": (batch, batch, 32, tokens),
        f"{batch} per stage": (batch, pp * batch, 32, tokens),
        f"{8 * batch} in flight": (8 * batch, 8 * batch, 32, tokens),
        f"prefill of {batch}": (batch, batch, prompt, 1),
    }
    rows = []
    for load, (alone, together, length, new) in loads.items():
        variants = {
            f"{load}, one rank": {"batch": alone},
            f"{load}, PP={pp}": {"pipeline_parallel_size": pp, "batch": together},
        }
        pair = in_turns(
            model, variants, batch=alone, prompt=length, tokens=new, repeats=repeats, dtype=dtype, threads=threads,
            max_num_batched_tokens=step if new == 1 else 32 * together,
        )  # fmt: skip
        for row in pair:
            tpot = row["tpot_ms"]
            row["load"] = load
            row["throughput"] = row["batch"] / tpot * 1e3 if tpot else row["batch"] * length / row["seconds"]
            row["gain"] = speedup(row, pair[0], "tpot_ms" if tpot else "seconds") * row["batch"] / alone
        rows += pair
    return rows


def hosts(
    model: str, *, dtype: str = "auto", tp: int = 2, pp: int = 2, batch: int = 1, prompt: int = 128, tokens: int = 16,
    repeats: int = 3, threads: int | None = None, link: str | None = None,
) -> list[Row]:  # fmt: skip
    """A layout over several hosts, each tensor-parallel group inside one of them and then across them; both take turns.

    The hosts are torchrun's, or emulated ones, `tp` ranks on each, joined by a `link`.

    Rows are `in_turns`'s, with `measured_bytes` from host to host for each decoded token, `predicted_bytes` by a dry run (not
    on torchrun's later ranks), and `slowdown`: TPOT over that of the first row. Raises ValueError if there is only one host.
    """
    at = f"{link},{tp}ranks/host" if link and "/host" not in link else link
    orders = {"TP inside hosts": "dp-pp-tp", "TP across hosts": "dp-tp-pp"}
    if tp < 2 or pp < 2:
        raise ValueError(f"tp={tp}, pp={pp}: use 2 or more")
    rows = in_turns(
        model, {name: {"rank_order": order} for name, order in orders.items()}, batch=batch, prompt=prompt, tokens=tokens,
        repeats=repeats, dtype=dtype, threads=threads, link=at, tensor_parallel_size=tp, pipeline_parallel_size=pp,
    )  # fmt: skip
    for row, order in zip(rows, orders.values(), strict=True):
        if row["hosts"] == 1:
            raise ValueError("all ranks are on one host: give a link, or run it under torchrun on several hosts")
        row["measured_bytes"] = row["between_hosts_bytes_per_token"]["decode"]
        row["slowdown"] = speedup(rows[0], row)
        if not in_torchrun() or os.environ["RANK"] == "0":
            dry = dryrun(
                model, tp=tp, pp=pp, batch=batch, context=prompt + 1, dtype=row["dtype"], device="cpu", rank_order=order,
                ranks_per_host=sum(rank["host"] == 0 for rank in row["ranks"]),
            )  # fmt: skip
            row["predicted_bytes"] = dry["between_hosts_bytes_per_token"]["decode"]
    return rows


def experts(
    model: str, *, dtype: str = "auto", tp: int = 1, dp: int = 2, batch: int = 8, prompt: int = 512, tokens: int = 16,
    repeats: int = 3, threads: int | None = None, link: str | None = None, text: Path | None = None,
) -> list[Row]:  # fmt: skip
    """A mixture-of-experts model over dp x tp ranks with its experts spread, against one rank; all take turns.

    Rows: each way of exchange (`parallel.expert`); other placements: round-robin, and by the load that one rank measured on
    other prompts; as many ranks along "tp", each expert cut over them; independent replicas; one rank with as many threads as
    one of the others has.

    text: prompts are cut out of it, one after another, the first `batch` of them only to measure the load; by default
    tiny-moe's held-out text, and random ids for other models.

    Rows are `in_turns`'s, with `prefill_speedup` (by TTFT) and `decode_speedup` (by TPOT) over the one rank,
    `busiest_over_mean` of the experts' load, and `exchange_bytes`: what leaves the rank that sends most, per prompt token of
    the whole batch and layer with experts, for the experts alone.
    """
    if dp * tp < 2:
        raise ValueError(f"dp={dp}, tp={tp}: experts are spread over dp x tp ranks, 2 or more")
    if text is None and model == TINY_MOE.name:
        text = TINY_MOE / "heldout.txt"
    threads = threads or threads_per_rank(dp * tp)
    common: dict[str, Any] = {"dtype": dtype, "threads": threads, "max_num_batched_tokens": batch * prompt}
    first, others = _prompts(model, text, batch, prompt)
    with LLM(model, max_model_len=prompt + 1, max_num_seqs=batch, **common) as llm:
        llm.generate(first, SamplingParams(temperature=0.0, max_tokens=1))
        report = llm.report()["experts"]
    if report is None:
        raise ValueError(f"{model} has no experts: use tiny-moe, or another mixture-of-experts model")
    by_load = {layer["layer"]: experts_by_load(layer["tokens"], dp * tp) for layer in report["layers"]}
    ep: Row = {"tensor_parallel_size": tp, "data_parallel_size": dp, "enable_expert_parallel": True, "link": link}
    variants: dict[str, Row] = {exchange: ep | {"expert_exchange": exchange} for exchange in EXCHANGES}
    variants |= {"all_to_all, round-robin": ep | {"expert_placement": "round-robin"}}
    variants |= {"all_to_all, by load": ep | {"expert_placement": by_load}}
    variants |= {f"TP={dp * tp} in experts": {"tensor_parallel_size": dp * tp, "link": link}}
    variants |= {f"{dp * tp} replicas": {"data_parallel_size": dp * tp, "link": link}, "one rank": {}}
    rows = in_turns(
        model, variants, batch=batch, prompt=prompt, tokens=tokens, repeats=repeats, prompts=others, **common
    )
    for row in rows:
        sent = [rank["wire_bytes"]["prefill"] for rank in row["ranks"]]
        kinds = ("counts", "dispatch", "combine", "tokens", "mlp")
        most = max(sum(each.get(kind, 0) for kind in kinds) for each in sent)
        row["exchange_bytes"] = most / (batch * prompt) / len(report["layers"])
        row["busiest_over_mean"] = row["experts"]["busiest_over_mean"]
        row["ttft_ms"] = median(row["ttft_ms_all"])  # of its own, not that of the run with the median TPOT
    for row in rows:
        row["prefill_speedup"] = speedup(row, rows[-1], "ttft_ms")
        row["decode_speedup"] = speedup(row, rows[-1]) if row["tpot_ms"] else None
    return rows


def _prompts(model: str, text: Path | None, batch: int, prompt: int) -> tuple[list[list[int]], list[list[int]]]:
    """Two batches of prompts that have nothing in common."""
    if text is None:
        vocab = find(model).config.vocab
        ids = torch.randint(0, vocab, (2 * batch * prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(find(model).folder).backend_tokenizer
        ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
        if len(ids) < 2 * batch * prompt:
            raise ValueError(f"{text} has {len(ids)} tokens; 2 x batch x prompt = {2 * batch * prompt} are needed")
    pieces = [ids[i * prompt : (i + 1) * prompt] for i in range(2 * batch)]
    return pieces[:batch], pieces[batch:]


def overlap(
    model: str, *, dtype: str = "auto", tp: int = 2, batch: int = 4, prompt: int = 512, repeats: int = 3,
    threads: int | None = None, links: Sequence[str] = (), modes: Sequence[str] = MODES,
) -> list[Row]:  # fmt: skip
    """Prefill time with and without overlap over links of several rates.

    links: as "1gbit"; by default four around the rate at which communication takes as long as computation, which is found
    from one run through sockets without a link.

    Rows are `in_turns`'s, for each link and mode, with `gain` over mode "none" on the same link, and `comm_ms`, `hidden_ms`:
    what the rank that waits most was kept by, and what went on beside its work.
    """
    work: dict[str, Any] = {
        "batch": batch, "prompt": prompt, "tokens": 1, "dtype": dtype, "threads": threads, "tensor_parallel_size": tp,
        "max_num_batched_tokens": batch * prompt, "shared_memory": False,
    }  # fmt: skip
    if not links:
        [free] = in_turns(model, {"none": {}}, repeats=repeats, **work)
        computing = free["seconds"] - _comm_ms(free, "ms_per_token") / 1e3
        wire = sum(c["wire_bytes_per_token"] for c in free["comm"] if c["phase"] == "prefill") * batch * prompt
        balanced = wire * 8 / computing / 1e9
        links = [str(Link(round(balanced * factor, 3))) for factor in (0.5, 1, 2, 8)]
    rows = []
    for link in links:
        group = in_turns(model, {mode: {"overlap": mode} for mode in modes}, repeats=repeats, link=link, **work)
        for row in group:
            row["gain"] = speedup(row, group[0], "seconds")
            row["comm_ms"], row["hidden_ms"] = _comm_ms(row, "ms_per_token"), _comm_ms(row, "hidden_ms_per_token")
        rows += group
    return rows


def _comm_ms(row: Row, field: str) -> float:
    """Milliseconds of prefill communication, of all prompts together."""
    tokens = row["batch"] * row["prompt_tokens"]
    return sum(c[field] for c in row["comm"] if c["phase"] == "prefill") * tokens
