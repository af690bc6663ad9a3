"""One report from what each rank counted: the fields that `LLM.report()`, `labkit generate --json` and `bench` share."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from labkit.engine.core import EngineOptions
from labkit.engine.requests import Token
from labkit.launch.local import oversubscribed
from labkit.measure.machine import hardware
from labkit.mesh import Layout, pick_backend
from labkit.split import busiest_over_mean


def assemble(
    layout: Layout,
    options: EngineOptions,
    threads: int,
    ranks: Sequence[dict[str, Any]],
    steps: Sequence[Sequence[Token]],
) -> dict[str, Any]:
    """The report of one `generate`.

    tokens_per_s: generated tokens of all requests over the whole time. ttft_ms, tpot_ms: medians over requests of the time to
    the first token, and of the mean time between later ones (None without a second token). itl_ms: the median of all times
    between a token and the next of its request, which a few long waits don't move. comm: one entry per operation,
    axis, phase and kind; per token = per decode step of one sequence (decode) or per prompt token (prefill), on the rank
    that does most of it; ms_per_token is what the rank was kept by it, hidden_ms_per_token what went on beside its work. With
    a batch, one call serves several sequences, so calls_per_token is below calls per step. hosts: how many the ranks are on.
    between_hosts_bytes_per_token: by phase, what the ranks of one replica together send from host to host.
    """
    times: dict[int, list[float]] = {}
    for step in steps:
        for token in step:
            times.setdefault(token.request, []).append(token.seconds)
    gaps = [later - earlier for t in times.values() for earlier, later in pairwise(t)]
    tpots = [(t[-1] - t[0]) / (len(t) - 1) for t in times.values() if len(t) > 1]
    generated = sum(len(t) for t in times.values())
    seconds = max((r["seconds"] for r in ranks), default=0.0)
    here = max((r["ranks_here"] for r in ranks), default=layout.world)
    backend, device = pick_backend(here)
    return {
        "layout": layout.as_dict(),
        "hardware": hardware(device),
        "backend": backend,
        "dtype": options.dtype,
        "threads_per_rank": threads,
        "oversubscribed": oversubscribed(here),
        "hosts": len({r["host"] for r in ranks}),
        "between_hosts_bytes_per_token": {
            phase: between_hosts_bytes_per_token(ranks, phase) / layout.dp for phase in ("prefill", "decode")
        },
        "overlap": options.overlap,
        "tokens_per_s": generated / seconds if seconds else None,
        "ttft_ms": median(t[0] for t in times.values()) * 1e3 if times else None,
        "tpot_ms": median(tpots) * 1e3 if tpots else None,
        "itl_ms": median(gaps) * 1e3 if gaps else None,
        "bubble_fraction": max((r["bubble_fraction"] for r in ranks), default=0.0),
        "ranks": [
            {
                **{k: v for k, v in r.items() if k not in ("comm", "events", "experts")},
                "decode_comm_ms_per_token": _decode_comm_ms(r),
                "wire_bytes": _wire_bytes(r),
            }
            for r in ranks
        ],
        "comm": _comm(ranks),
        "experts": _experts(layout, options.spread.exchange, ranks),
    }


def between_hosts_bytes_per_token(ranks: Sequence[dict[str, Any]], phase: str) -> float:
    """Bytes that ranks (`Engine.report`) send to ranks on other hosts for each token of their replica, all ranks together."""
    entries = [e for rank in ranks for e in rank["comm"] if e["phase"] == phase]
    return sum(e["between_hosts_bytes"] / max(e["tokens"], 1) for e in entries)


def _decode_comm_ms(rank: dict[str, Any]) -> float:
    """Time of one rank inside operations, waiting included, per decode step of one sequence."""
    return sum(e["seconds"] * 1e3 / max(e["tokens"], 1) for e in rank["comm"] if e["phase"] == "decode")


def _wire_bytes(rank: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What one rank sent, by phase and by what it carried."""
    sent: dict[str, dict[str, int]] = {"prefill": {}, "decode": {}}
    for entry in rank["comm"]:
        kinds = sent.setdefault(entry["phase"], {})
        kinds[entry["what"]] = kinds.get(entry["what"], 0) + entry["wire_bytes"]
    return sent


def _experts(layout: Layout, exchange: str, ranks: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What the routers did in the last `generate`; None for a model without experts.

    layers: of each layer with experts its `placement`, the experts of each expert-parallel rank; how many `tokens` asked for
    each expert, in all replicas; and `busiest_over_mean`, the load of the busiest rank over the mean. The same for all
    together: the sum of the busiest over the sum of the means, since each layer waits for its busiest rank. (Averaged over
    steps: a single step may be less balanced.)
    bytes: by what was exchanged (dispatch, combine), sent from each rank to each rank, what stayed on a rank included.
    """
    layers: dict[int, dict[str, Any]] = {}
    for rank in ranks:
        for each in rank["experts"]:
            seen = layers.setdefault(each["layer"], {**each, "tokens": [0] * len(each["tokens"])})
            seen["tokens"] = [a + b for a, b in zip(seen["tokens"], each["tokens"], strict=True)]
    if not layers:
        return None
    busiest = mean = 0.0
    for each in layers.values():
        each["busiest_over_mean"] = busiest_over_mean(each["tokens"], each["placement"])
        share = sum(each["tokens"]) / len(each["placement"])
        busiest, mean = busiest + each["busiest_over_mean"] * share, mean + share
    sent: dict[str, list[list[int]]] = {}
    for rank in ranks:
        for entry in rank["comm"]:
            if entry["op"] == "all_to_all":
                matrix = sent.setdefault(entry["what"], [[0] * len(ranks) for _ in ranks])
                for to, count in zip(layout.peers(rank["rank"], entry["axis"]), entry["sent_to"], strict=True):
                    matrix[rank["rank"]][to] += count
    return {
        "exchange": exchange if layout.ep > 1 else None,
        "layers": [layers[number] for number in sorted(layers)],
        "busiest_over_mean": busiest / mean if mean else 1.0,
        "bytes": sent,
    }


def _comm(ranks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of operation, the figures of the busiest rank."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for rank in ranks:
        for entry in rank["comm"]:
            if not entry["tokens"] and entry["phase"]:
                continue  # it only took part in steps of other replicas
            tokens = max(entry["tokens"], 1)
            name = {k: entry[k] for k in ("op", "axis", "phase", "what")}
            row = rows.setdefault(tuple(name.values()), {**name, **dict.fromkeys(_PER_TOKEN, 0.0)})
            for field, (source, scale) in _PER_TOKEN.items():
                row[field] = max(row[field], entry[source] * scale / tokens)
    return list(rows.values())


_PER_TOKEN = {
    "calls_per_token": ("calls", 1),
    "payload_bytes_per_token": ("payload_bytes", 1),
    "wire_bytes_per_token": ("wire_bytes", 1),
    "ms_per_token": ("seconds", 1e3),
    "hidden_ms_per_token": ("hidden_seconds", 1e3),
}
