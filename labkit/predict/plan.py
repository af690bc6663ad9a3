"""Which layout for a model on a number of GPUs: all that divide the work, what does not fit and why, and the best of the rest.

Every layout is put through the cost model (`labkit.predict.cost`); nothing is ranked by rules of thumb. Latency is the time
between two tokens with the sequences asked for; throughput is what a layout reaches with as many sequences as its memory holds.
"""

import math
from bisect import bisect_left
from dataclasses import replace
from typing import Any

from labkit.mesh import Layout
from labkit.predict.commands import HUB, commands
from labkit.predict.cost import EXCHANGES, USABLE, Deployment, Load, Terms, deployment
from labkit.predict.hardware import Hardware, hardware
from labkit.predict.shape import Shape, shape_of

OBJECTIVES = ("latency", "throughput")
MOST = 1024  # sequences that a scheduler runs at once on one replica, at most


def plan(
    model: str, hardware_: str | Hardware, *, gpus: int, context: int = 2048, batch: int = 1, rate: float | None = None,
    objective: str = "latency", dtype: str = "auto", kv_dtype: str = "auto", engine_: str = "typical",
    prompt: int | None = None, output: int | None = None, step: int = 8192,
) -> dict[str, Any]:  # fmt: skip
    """All layouts of `gpus` GPUs, ranked.

    Args:
        context, batch, dtype, kv_dtype, engine_, prompt, output, step: as for `labkit.predict.cost.predict`.
        rate: requests per second, instead of `batch`: each layout then has as many in flight as arrive while one is served
            (Little's law). Needs `output`.
        objective: "latency" (TPOT with the sequences asked for) or "throughput" (tokens per second with a full memory).

    Returns `layouts`, the best first and those that don't fit last: `layout`, `fits`, `reason` (what it is good or bad for, or
    why it does not fit), `memory_gb_per_gpu` and `memory`, its parts as in `predict`; of those that fit `batch`, `tpot_ms`,
    `ttft_ms`, `tokens_per_s`, `terms`; the same for as many sequences as fit, `max_batch`, `max_tpot_ms`, `max_tokens_per_s`;
    `pareto`: no other has both a lower TPOT and a higher throughput. `recommended`: the first of them with `commands` that
    launch it, None if none fits. `refused`: how many don't fit. Raises ModelError or ValueError.
    """
    if gpus < 1:
        raise ValueError(f"gpus={gpus}: use 1 or more")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: use {', '.join(OBJECTIVES)}")
    if rate is not None and (rate <= 0 or not output):
        raise ValueError(f"rate={rate}: use requests per second above 0, and output, the tokens of each")
    shape, hw, per_token = shape_of(model), hardware(hardware_) if isinstance(hardware_, str) else hardware_, 0.0
    if output is not None:
        prompt = prompt or context
        context, per_token = round(prompt + output / 2), prompt / output
    load = Load(
        batch=batch, context=context, dtype="bfloat16" if dtype == "auto" else dtype, kv_dtype=kv_dtype,
        prompt=prompt or context, step=step, prompt_tokens_per_token=per_token,
    )  # fmt: skip
    rows, found = [], []
    for layout in layouts(shape, gpus):
        row: dict[str, Any] = {"layout": layout.as_dict(), "fits": False, "memory_gb_per_gpu": None, "memory": None}
        if why := misfit(shape, layout):
            rows.append(row | {"reason": why})
            continue
        at = deployment(
            model, hw, tp=layout.tp, pp=layout.pp, dp=layout.dp, ep=layout.expert_parallel, engine_=engine_, load=load
        )
        row["memory"] = at.memory()
        row["memory_gb_per_gpu"] = row["memory"]["total_gb"]
        room = most_sequences(at)
        if rate is not None and room:
            at = with_rate(at, rate, output or 1, room)
        if room < at.load.batch:
            rows.append(row | {"reason": _too_large(at, room)})
            continue
        found.append((row, at, room))
    done = [_timed(row, at, room) for row, at, room in found]
    key = (lambda r: r["tpot_ms"]) if objective == "latency" else (lambda r: -r["max_tokens_per_s"])
    best = sorted(done, key=key)
    for row in best:
        row["pareto"] = not any(
            other["tpot_ms"] < row["tpot_ms"] and other["max_tokens_per_s"] > row["max_tokens_per_s"] for other in best
        )
    at_of = {id(row): at for row, (_, at, _) in zip(done, found, strict=True)}
    for row in best:
        row["reason"] = _reason(row, best, at_of[id(row)], objective)
    recommended = None
    if best:
        chosen = at_of[id(best[0])]
        recommended = best[0] | {"commands": commands(chosen, HUB.get(model, model))}
    return {
        "model": model,
        "hardware": hw.name,
        "gpus": gpus,
        "objective": objective,
        "dtype": load.dtype,
        "batch": load.batch,
        "context": context,
        "usable_gb_per_gpu": USABLE * hw.memory_gb,
        "layouts": best + rows,
        "refused": len(rows),
        "recommended": recommended,
    }


def layouts(shape: Shape, gpus: int) -> list[Layout]:
    """Every dp x pp x tp of `gpus`; with experts, also with these spread over dp x tp."""
    found = []
    for tp in (n for n in range(1, gpus + 1) if gpus % n == 0):
        for pp in (n for n in range(1, gpus // tp + 1) if gpus // tp % n == 0):
            dp = gpus // tp // pp
            found += [
                Layout(tp, pp, dp, spread) for spread in (False, True) if not spread or (shape.moe and tp * dp > 1)
            ]
    return found


def misfit(shape: Shape, layout: Layout) -> str:
    """Why a model can't be cut evenly that way, as serving programs want it (the engine here cuts unevenly too); "" if it can."""
    tp, pp, kv = layout.tp, layout.pp, shape.kv_heads
    if shape.heads % tp:
        return f"{shape.heads} query heads are not a multiple of tp={tp}"
    if kv % tp and tp % kv:
        return f"{kv} KV heads are neither a multiple nor a divisor of tp={tp}"
    widths = {"the MLP's width": shape.intermediate, "the shared experts' width": shape.shared_width}
    if shape.moe and layout.ep == 1:
        widths["the experts' width"] = shape.moe.width
    for name, width in widths.items():
        if width % tp:
            return f"{name} {width} is not a multiple of tp={tp}"
    if pp > shape.layers:
        return f"{shape.layers} layers are fewer than pp={pp}"
    if layout.ep > 1 and shape.moe and shape.moe.experts % layout.ep:
        return f"{shape.moe.experts} experts are not a multiple of dp x tp = {layout.ep}"
    return ""


def most_sequences(at: Deployment) -> int:
    """Sequences that all replicas together have memory for, `MOST` on each at most; 0 if not even one."""
    dp = at.layout.dp

    def too_many(each: int) -> bool:
        return not replace(at, load=replace(at.load, batch=each * dp)).memory()["fits"]

    return bisect_left(range(1, MOST + 1), True, key=too_many) * dp


def with_rate(at: Deployment, rate: float, output: int, room: int) -> Deployment:
    """With as many sequences in flight as arrive while one is served; with more than `room` if even that many don't suffice."""
    batch = 1
    while True:
        at = replace(at, load=replace(at.load, batch=batch))
        needed = math.ceil(rate * (at.prefill().seconds + output * at.decode().seconds))
        if needed <= batch or batch > room:
            return at
        batch = min(max(needed, batch + 1), room + 1)


def _timed(row: dict[str, Any], at: Deployment, room: int) -> dict[str, Any]:
    decode, full = at.decode(), replace(at, load=replace(at.load, batch=room)).decode()
    return row | {
        "fits": True,
        "batch": at.load.batch,
        "tpot_ms": decode.seconds * 1e3,
        "ttft_ms": at.prefill().seconds * 1e3,
        "tokens_per_s": at.load.batch / decode.seconds,
        "max_batch": room,
        "max_tpot_ms": full.seconds * 1e3,
        "max_tokens_per_s": room / full.seconds,
        "terms": _milliseconds(decode),
        "max_terms": _milliseconds(full),
    }


def _milliseconds(terms: Terms) -> dict[str, float]:
    return {term.name: term.seconds * 1e3 for term in terms.values() if term.seconds}


def _too_large(at: Deployment, room: int) -> str:
    memory = at.memory()
    usable, total = memory["usable_gb"], memory["total_gb"]
    parts = (
        f"{memory['weights_gb']:.1f} GB of weights, {memory['kv_gb']:.1f} of KV cache and {memory['activations_gb']:.1f} of "
        f"activations are {total:.1f} GB, {total - usable:.1f} more than the {usable:.1f} usable of {at.hw.memory_gb:g} GB"
    )
    if not room:
        return parts
    return f"room for {room} sequences of {at.load.context:g} tokens, not {at.load.batch}: {parts}"


# -- reasons --------------------------------------------------------------------------------------------------------------


def _reason(row: dict[str, Any], best: list[dict[str, Any]], at: Deployment, objective: str) -> str:
    """What decides for or against a layout: against the second best for the best, against the best for the others."""
    other = best[1] if row is best[0] and len(best) > 1 else best[0]
    full = objective == "throughput"
    sentences = [f"{row['max_tokens_per_s']:,.0f} tokens/s with {row['max_batch']} sequences"] if full else []
    if row is not other:
        # Of a full memory, a token's share of the time counts: layouts have room for different numbers of sequences.
        mine, theirs = (
            {
                name: ms / (each["max_batch"] if full else 1)
                for name, ms in each["max_terms" if full else "terms"].items()
            }
            for each in (row, other)
        )
        gap = sum(mine.values()) - sum(theirs.values())
        differences = {name: mine.get(name, 0.0) - theirs.get(name, 0.0) for name in {**mine, **theirs}}
        cause = (min if gap < 0 else max)(differences, key=lambda name: differences[name])
        sentences.append(
            f"{_time(abs(gap))} {'less' if gap < 0 else 'more'} for each token than {words(other['layout'])}, mostly for "
            f"{cause} ({'-' if differences[cause] < 0 else '+'}{_time(abs(differences[cause]))})"
        )
    return "; ".join(sentences + notes(at)) or "the only layout that fits"


def _time(ms: float) -> str:
    return f"{ms:.3g} ms" if ms >= 0.1 else f"{ms * 1e3:.3g} us"


def notes(at: Deployment) -> list[str]:
    """What is to be known of a layout on this hardware."""
    found, layout, hw, shape = [], at.layout, at.hw, at.shape
    if layout.tp > hw.node_gpus:
        found.append(f"all-reduces cross the boundary of nodes of {hw.node_gpus} GPUs")
    elif layout.tp > 1 and layout.world > hw.node_gpus:
        found.append("all-reduces stay inside nodes")
    if not shape.latent and layout.tp > shape.kv_heads:
        found.append(f"{shape.kv_heads} KV heads are each held {layout.tp // shape.kv_heads} times")
    if shape.latent and layout.tp > 1:
        found.append(f"the latent KV cache is held {layout.tp} times")
    if layout.pp > 1 and at.lanes < layout.pp:
        found.append(f"{at.sequences} sequence(s) leave {layout.pp - at.lanes} of {layout.pp} stages idle")
    if layout.dp > 1 and layout.ep == 1:
        found.append(f"each of {layout.dp} replicas reads all weights")
    decode = at.decode()
    share = sum(term.seconds for term in decode.values() if term.name in EXCHANGES) / decode.seconds
    if share > 0.2:
        found.append(f"{share:.0%} of the time is exchanges ({hw.link_gbs:g} GB/s links)")
    return found


def words(layout: dict[str, int]) -> str:
    """ "tp=8 x pp=2" """
    return " x ".join(f"{name}={size}" for name, size in layout.items() if size > 1) or "one GPU"
