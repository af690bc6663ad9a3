"""The lessons' figures. Each function returns a `Picture`: a matplotlib Figure that carries its own alt text.

A rank has the same colour and hatch everywhere (Okabe and Ito's palette, readable with colour-blindness), and its number
stands beside them.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from labkit.measure.trace import Span
from labkit.predict.plan import words
from labkit.split import busiest_over_mean

COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")
_PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_GREYS = ("#555555", "#aaaaaa", "#dddddd")  # terms of a sum aren't ranks
_TERMS = tuple((grey, hatch) for hatch in ("", "///", "...") for grey in ("#777777", "#bbbbbb", "#eeeeee"))


class Picture(Figure):
    """A Figure that a notebook shows with its alt text, and a terminal as the alt text."""

    def __init__(self, alt: str, size: tuple[float, float]) -> None:
        super().__init__(figsize=size, dpi=110, layout="constrained")
        self.agg = FigureCanvasAgg(self)
        self.alt = alt

    def html(self) -> str:
        """The picture itself, and its text for who doesn't see it."""
        return self._repr_mimebundle_()[0]["text/html"]

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        file = io.BytesIO()
        self.agg.print_png(file)  # savefig draws everything twice
        png = base64.b64encode(file.getvalue()).decode()
        # JupyterLab gives a PNG no alt text, HTML it takes as it is; others look for a PNG.
        html = f'<img alt="{escape(self.alt)}" src="data:image/png;base64,{png}">'
        return {"image/png": png, "text/html": html, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def _style(rank: int) -> dict[str, Any]:
    return {"facecolor": COLOURS[rank % 8], "hatch": HATCHES[rank % 8], "edgecolor": "black", "linewidth": 0.8}


def owners(shares: Mapping[str, Sequence[range]]) -> Picture:
    """Who holds what: for each name (a matrix's rows, heads, ...) the range of each rank, in rank order; ranges may overlap."""
    held = "; ".join(
        f"{name}: " + ", ".join(f"rank {r} holds {p.start} to {p.stop - 1}" for r, p in enumerate(parts) if p)
        for name, parts in shares.items()
    )
    heights = {"height_ratios": [1 + len(parts) for parts in shares.values()]}
    picture = Picture(f"Who holds what. {held}.", (7, 0.3 * sum(2 + len(parts) for parts in shares.values())))
    axes = picture.subplots(len(shares), squeeze=False, gridspec_kw=heights)[:, 0]
    for ax, (name, parts) in zip(axes, shares.items(), strict=True):
        for rank, part in enumerate(parts):
            ax.barh(rank, len(part), left=part.start, height=0.8, clip_on=False, **_style(rank))
            ax.text(
                (part.start + part.stop) / 2, rank, f"rank {rank}", fontsize=8, ha="center", va="center", bbox=_PLATE
            )
        ends = sorted({end for part in parts for end in (part.start, part.stop)})
        ax.set(title=name, yticks=[], xticks=ends, ylim=(len(parts) - 0.4, -0.6), xlim=(0, max(ends)))
        ax.title.set_fontsize(9)
        _bare(ax)
    return picture


def grid(ranks: Sequence[Mapping[str, Any]]) -> Picture:
    """Who stands where and holds what (`report["ranks"]`, of one replica): a row for each stage, a column for each shard."""
    held = [
        (
            r["place"]["pp"],
            r["place"]["tp"],
            f"rank {r['rank']}",
            f"{r['layers']} layers, {r['weights_bytes'] / 1e6:.0f} MB",
        )
        for r in ranks
    ]
    said = "; ".join(f"stage {pp}, shard {tp}: {rank}, {what}" for pp, tp, rank, what in held)
    stages, shards = max(pp for pp, *_ in held) + 1, max(tp for _, tp, *_ in held) + 1
    picture = Picture(f"The grid of ranks. {said}.", (1.2 + 1.9 * shards, 0.7 + 0.6 * stages))
    ax = picture.subplots()
    for r, (pp, tp, rank, what) in zip(ranks, held, strict=True):
        ax.add_patch(Rectangle((tp - 0.45, pp - 0.4), 0.9, 0.8, **_style(r["rank"])))
        ax.text(tp, pp, f"{rank}\n{what}", fontsize=8, ha="center", va="center", bbox=_PLATE)
    ax.set(xlim=(-0.5, shards - 0.5), ylim=(stages - 0.5, -0.5), xticks=range(shards), yticks=range(stages))
    ax.set_yticklabels([f"stage {stage}" for stage in range(stages)])
    ax.set_xticklabels([f"shard {shard}" for shard in range(shards)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return picture


def memory(bytes_by_rank: Mapping[str, Sequence[float]], title: str = "Weights per rank") -> Picture:
    """Bars of bytes for each rank, grouped by layout."""
    said = "; ".join(f"{name}: " + ", ".join(f"{b / 1e6:.1f}" for b in sizes) for name, sizes in bytes_by_rank.items())
    picture = Picture(f"{title}, in MB of each rank. {said}.", (7, 3))
    ax = picture.subplots()
    at, middles = 0.0, []
    for sizes in bytes_by_rank.values():
        for rank, size in enumerate(sizes):
            ax.bar(at + rank, size / 1e6, width=0.9, **_style(rank))
            ax.annotate(f"{size / 1e6:.0f}", (at + rank, size / 1e6), ha="center", va="bottom", fontsize=8)
            ax.annotate(
                f"r{rank}", (at + rank, 0), (0, 3), textcoords="offset points", ha="center", fontsize=8, bbox=_PLATE
            )
        middles.append(at + (len(sizes) - 1) / 2)
        at += len(sizes) + 0.8
    ax.set(title=title, ylabel="MB (1e6 bytes)", xticks=middles, xticklabels=list(bytes_by_rank))
    ax.margins(y=0.12)
    _bare(ax)
    return picture


def footprint(
    parts: Mapping[str, Mapping[str, float]], room: float, title: str = "Memory of the fullest GPU"
) -> Picture:
    """What a GPU must hold, in GB: for each layout its parts side by side, against the `room` that there is (dashed)."""
    said = "; ".join(
        f"{name}: {_sum(own, 'GB')}, {'fits' if sum(own.values()) <= room else 'does not fit'}"
        for name, own in parts.items()
    )
    picture = Picture(f"{title}, of {room:.1f} GB that can be used. {said}.", (8, 1.1 + 0.34 * len(parts)))
    ax = picture.subplots()
    _stacked(ax, parts, "GB")
    _room(ax, room)
    ax.set_title(title, pad=18)
    ax.set_xlabel("GB (1e9 bytes)")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


def terms(ms: Mapping[str, Mapping[str, float]], title: str) -> Picture:
    """Milliseconds, for each layout the terms that make them up side by side."""
    said = "; ".join(f"{name}: {_sum(own, 'ms')}" for name, own in ms.items())
    picture = Picture(f"{title}. {said}.", (8, 1.0 + 0.34 * len(ms)))
    ax = picture.subplots()
    _stacked(ax, ms, "ms")
    ax.set(title=title, xlabel="ms")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


# Parts of a GPU's memory (`Deployment.memory`), and the cost model's terms under fewer names; all others are exchanges.
_PARTS = {"weights": "weights_gb", "KV cache": "kv_gb", "activations": "activations_gb"}
_KINDS = {
    "weights": "weights", "arithmetic beyond reading": "weights", "KV cache": "KV cache",
    "attention scores beyond reading": "KV cache", "layers": "fixed cost", "routers": "fixed cost", "sequences": "fixed cost",
    "waiting for the slowest stage": "waiting", "expert imbalance": "waiting", "prompts of others": "prompts of others",
}  # fmt: skip


def plan(planned: Mapping[str, Any], most: int = 7) -> Picture:
    """What a planner found (`labkit.predict.plan`): memory of `most` layouts, the best and those that nearly fit; what a token's
    time goes to, in those that fit; time per token over throughput with a full memory: those on the dashed line are beaten by
    none.
    """
    fitting, room = [row for row in planned["layouts"] if row["fits"]], planned["usable_gb_per_gpu"]
    refused = [row for row in planned["layouts"] if row["memory"] and not row["fits"]]
    rows = [*fitting, *sorted(refused, key=lambda row: row["memory_gb_per_gpu"])][:most]
    held = {words(row["layout"]): {part: row["memory"][name] for part, name in _PARTS.items()} for row in rows}
    times = {words(row["layout"]): _by_kind(row["terms"]) for row in fitting[:most]}
    picture = Picture(_said(planned, held, times, fitting), (11, 2.1 + 0.3 * (len(held) + len(times))))
    picture.set_layout_engine("none")  # it would draw everything once more, and a slider's user waits
    place: dict[str, Any] = {"left": 0.175, "right": 0.98, "top": 0.94, "bottom": 0.09, "hspace": 0.35, "wspace": 0.17}
    place |= {"width_ratios": [5, 4], "height_ratios": [1 + len(held), 1 + len(times)]}
    axes = picture.subplot_mosaic([["memory", "pareto"], ["terms", "pareto"]], gridspec_kw=place)
    for ax, bars, unit, title in (
        (axes["memory"], held, "GB", "fullest GPU"),
        (axes["terms"], times, "ms", f"token, {planned['batch']} in flight"),
    ):
        _stacked(ax, bars, unit)
        ax.set_title(title, fontsize=9, loc="left", x=-0.34)
        ax.tick_params(labelsize=8)
        if bars:
            ax.legend(
                frameon=False, fontsize=7, ncols=6, loc="lower right", bbox_to_anchor=(1.02, 0.98), handlelength=1.2,
                columnspacing=1,
            )  # fmt: skip
    axes["memory"].axvline(room, color="#D55E00", linestyle="--", linewidth=1.5)
    axes["memory"].annotate(
        f"room {room:.0f}", (room, 0), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8,
        color="#D55E00", bbox=_PLATE, zorder=5,
    )  # fmt: skip
    _pareto(axes["pareto"], fitting, most)
    return picture


def _pareto(ax: Axes, fitting: Sequence[Mapping[str, Any]], most: int) -> None:
    best = sorted((row["max_tokens_per_s"], row["tpot_ms"]) for row in fitting if row["pareto"])
    ax.plot([x for x, _ in best], [y for _, y in best], "--", color="black", linewidth=1)
    for row in fitting:
        at = row["max_tokens_per_s"], row["tpot_ms"]
        ax.plot(*at, "o" if row["pareto"] else "x", color="#0072B2" if row["pareto"] else "#999999")
        if row["pareto"] or len(fitting) <= most:
            ax.annotate(words(row["layout"]), at, (-5, 5), textcoords="offset points", fontsize=8, ha="right")
    ax.set(xlabel="tokens/s with a full memory", ylabel="ms per token")
    for scale, axis in ((ax.set_xscale, ax.xaxis), (ax.set_yscale, ax.yaxis)):
        if fitting:
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_locator(NullLocator())
    ax.set_title("right and low is good" if fitting else "nothing fits", fontsize=9, loc="left")
    ax.margins(x=0.4, y=0.15)
    _bare(ax)


def _by_kind(terms: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, ms in terms.items():
        kind = _KINDS.get(name, "exchanges")
        found[kind] = found.get(kind, 0.0) + ms
    return found


def _said(
    planned: Mapping[str, Any], held: Mapping[str, Any], times: Mapping[str, Any], fitting: Sequence[Mapping[str, Any]]
) -> str:
    memory = "; ".join(f"{name}: {_sum(parts, 'GB')}" for name, parts in held.items())
    tpot = "; ".join(f"{name}: {_sum(parts, 'ms')}" for name, parts in times.items()) or "none fits"
    front = "; ".join(
        f"{words(row['layout'])}: {row['max_tokens_per_s']:,.0f} tokens/s, {row['tpot_ms']:.3g} ms"
        for row in fitting if row["pareto"]
    )  # fmt: skip
    return (
        f"Plans for {planned['model']} on {planned['gpus']} x {planned['hardware']}. Memory of the fullest GPU, of "
        f"{planned['usable_gb_per_gpu']:.1f} GB: {memory}. Time per token: {tpot}. Beaten by none: {front or 'none'}."
    )


def latency(predicted: Mapping[str, Mapping[str, float]], measured: Mapping[str, float]) -> Picture:
    """Time per token in ms, for each layout the predicted terms stacked up, and the measured time beside them."""
    said = "; ".join(
        f"{name}: predicted {sum(terms.values()):.1f} ms ("
        + ", ".join(f"{term} {ms:.1f}" for term, ms in terms.items())
        + f"), measured {measured[name]:.1f} ms"
        for name, terms in predicted.items()
    )
    picture = Picture(f"Time per token. {said}.", (7, 3.4))
    ax = picture.subplots()
    names = list(predicted)
    base = [0.0] * len(names)
    for i, term in enumerate(next(iter(predicted.values()))):
        heights = [predicted[name][term] for name in names]
        ax.bar(
            [x - 0.21 for x in range(len(names))],
            heights,
            width=0.4,
            bottom=base,
            label=term,
            edgecolor="black",
            color=_GREYS[i],
        )
        base = [b + h for b, h in zip(base, heights, strict=True)]
    bars = [measured[name] for name in names]
    ax.bar(
        [x + 0.21 for x in range(len(names))], bars, width=0.4, label="measured", facecolor="white", edgecolor="black"
    )
    for x, (sum_of_terms, bar) in enumerate(zip(base, bars, strict=True)):
        ax.annotate(f"{sum_of_terms:.1f}", (x - 0.21, sum_of_terms), ha="center", va="bottom", fontsize=8)
        ax.annotate(f"{bar:.1f}", (x + 0.21, bar), ha="center", va="bottom", fontsize=8)
    ax.set(
        title="Time per token: predicted (stacked) and measured",
        ylabel="ms",
        xticks=range(len(names)),
        xticklabels=names,
    )
    ax.margins(y=0.12)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _bare(ax)
    return picture


def collectives(
    frame: pd.DataFrame, lines: Mapping[str, Sequence[tuple[float, float, float]]] | None = None
) -> Picture:
    """Time over size, both logarithmic, from a sweep's rows (`labkit.measure.collectives`); a curve for each op, path, and ranks.

    lines: for a curve's label, what `fit` has made of it, drawn dashed.
    """
    from labkit.measure.collectives import predict

    several = [column for column in ("op", "path", "ranks") if frame[column].nunique() > 1] or ["op"]
    groups = {", ".join(f"{v} ranks" if c == "ranks" else str(v) for c, v in zip(several, key, strict=True)): rows
              for key, rows in frame.groupby(several, sort=False)}  # fmt: skip
    said = "; ".join(
        f"{name}: {rows['median_us'].iloc[0]:.0f} us at {rows['bytes'].iloc[0]} bytes, "
        f"{rows['median_us'].iloc[-1]:.0f} us at {rows['bytes'].iloc[-1]}"
        for name, rows in groups.items()
    )
    picture = Picture(f"Median time of an operation over its size. {said}.", (7, 3.8))
    ax = picture.subplots()
    for i, (name, rows) in enumerate(groups.items()):
        colour = COLOURS[i % 8]
        ax.plot(rows["bytes"], rows["median_us"], marker="osD^v*Xp"[i % 8], markersize=4, color=colour, label=name)
        ax.fill_between(rows["bytes"], rows["median_us"], rows["p95_us"], color=colour, alpha=0.15, linewidth=0)
        if lines and name in lines:
            guesses = [predict(lines[name], size) for size in rows["bytes"]]
            ax.plot(rows["bytes"], guesses, "--", color="black", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="bytes", ylabel="us (median; shaded up to p95)")
    ax.set_xscale("log", base=2)
    ax.legend(frameon=False, fontsize=8)
    _bare(ax)
    return picture


def throughput(
    one: Mapping[int, float], piped: Mapping[int, float], predicted: Mapping[int, float], stages: int
) -> Picture:
    """Tokens/s of one rank and of a pipeline by the requests in flight (the keys), and by those for each stage.

    predicted: the pipeline's, drawn dashed. On the right, where both have as many for each stage, `stages` times one rank's.
    """
    single, piped = dict(one), dict(piped)  # from Series too
    alone = {n: rate for n, rate in single.items() if n * stages in piped}
    each = [alone, {n: piped[n * stages] for n in alone}, {n: rate * stages for n, rate in alone.items()}]
    panels = [
        ("by requests in flight", [single, piped, dict(predicted)]),
        ("by requests for each stage", each),
    ]
    names = ("one rank", f"PP={stages}", f"PP={stages}, predicted")
    said = "; ".join(
        f"{title}, {name}: " + ", ".join(f"{rate:.0f} at {n}" for n, rate in rates.items())
        for title, curves in panels for name, rates in zip(names, curves, strict=True)
    )  # fmt: skip
    picture = Picture(f"Tokens per second of all requests together. {said}.", (9, 3.4))
    for ax, (title, curves) in zip(picture.subplots(1, 2, sharey=True), panels, strict=True):
        for name, rates, style, colour in zip(
            names, curves, ("o-", "s-", "--"), ("#0072B2", "#D55E00", "black"), strict=True
        ):
            ax.plot(list(rates), list(rates.values()), style, color=colour, linewidth=1.3, label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(list(curves[0]), [str(n) for n in curves[0]])
        ax.yaxis.set_major_formatter("{x:.0f}")
        ax.set(title=title, xlabel="requests", ylabel="tokens/s")
        _bare(ax)
    picture.axes[0].legend(frameon=False, fontsize=8)
    return picture


def requests(rows: Sequence[Mapping[str, float]], batch: Sequence[tuple[float, int]]) -> Picture:
    """Requests one below the other: waiting, the prompt being computed, decoding. Below, how many were in the batch.

    rows: `arrived`, `started` (first computed), `first` (token) and `ended` of each, in seconds. batch: (seconds, count), asked
    again and again.
    """
    kinds = {"waiting": ("arrived", "started", "white", ".."), "prompt": ("started", "first", "#E69F00", "//"),
             "decoding": ("first", "ended", "#56B4E9", "")}  # fmt: skip
    said = "; ".join(
        f"request {i}: came at {row['arrived']:.2f} s, " + ", ".join(
            f"{kind} {(row[stop] - row[start]) * 1e3:.0f} ms" for kind, (start, stop, _, _) in kinds.items()
        )
        for i, row in enumerate(rows)
    )  # fmt: skip
    most = max(count for _, count in batch)
    picture = Picture(f"Requests over time, at most {most} in the batch. {said}.", (9, 1.9 + 0.18 * len(rows)))
    bars, below = picture.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [0.18 * len(rows), 1]})
    for kind, (start, stop, colour, hatch) in kinds.items():
        bars.barh(
            range(len(rows)), [row[stop] - row[start] for row in rows], left=[row[start] for row in rows], height=0.7,
            facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.4, label=kind,
        )  # fmt: skip
    bars.set(ylabel="request", yticks=range(0, len(rows), 5))
    bars.invert_yaxis()
    bars.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    below.fill_between(*zip(*batch, strict=True), step="post", color="#999999")
    below.set(ylabel="in batch", xlabel="s", ylim=(0, None), yticks=range(most + 1))
    for ax in (bars, below):
        _bare(ax)
    return picture


def load(rows: Sequence[Mapping[str, Any]]) -> Picture:
    """Latency over throughput, from `measure.serving.serve`'s rows; a curve for each `name`, a mark for each offered rate."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        curves.setdefault(row["name"], []).append(row)
    said = "; ".join(
        f"{name}: " + ", ".join(
            f"at {row['tokens_per_s']:.0f} tokens/s TTFT {row['ttft_ms']:.0f} ms (p95 {row['ttft_p95_ms']:.0f}) and "
            f"TPOT {row['tpot_ms'] or 0:.0f} ms" for row in own
        )
        for name, own in curves.items()
    )  # fmt: skip
    picture = Picture(f"Latency over throughput. {said}.", (9, 3.4))
    for ax, (field, label) in zip(
        picture.subplots(1, 2), (("ttft", "time to first token"), ("tpot", "time per output token")), strict=True
    ):
        for i, (name, own) in enumerate(curves.items()):
            rates, colour = [row["tokens_per_s"] for row in own], COLOURS[(5, 6, 2, 3)[i % 4]]
            ax.plot(rates, [row[f"{field}_ms"] for row in own], "osD^"[i % 4] + "-", color=colour, label=name)
            ax.plot(rates, [row[f"{field}_p95_ms"] for row in own], ":", color=colour, linewidth=1.3)
        ax.set(xlabel="tokens/s", ylabel="ms (dotted: p95)", title=label, ylim=(0, None), xlim=(0, None))
        _bare(ax)
    picture.axes[0].legend(frameon=False, fontsize=8)
    return picture


KINDS = {"compute": ("#dddddd", ""), "tp": ("#56B4E9", "//"), "pp": ("#E69F00", "\\\\"), "dp": ("#F0E442", "xx"),
         "waiting": ("#D55E00", ".."), "bubble": ("white", "..")}  # fmt: skip


def gantt(trace: Sequence[Span], start_ms: float = 0.0, stop_ms: float | None = None, title: str = "") -> Picture:
    """What each rank did between two moments of a trace (`labkit.measure.trace.spans`); thin bars went on beside its work."""
    stop = stop_ms if stop_ms is not None else max(s.ended for s in trace) * 1e3
    shown = [s for s in trace if s.ended * 1e3 > start_ms and s.began * 1e3 < stop]
    ranks = sorted({s.rank for s in shown})
    spent: dict[tuple[int, str], float] = {}
    for s in shown:
        if not s.flight:
            spent[s.rank, s.kind] = spent.get((s.rank, s.kind), 0.0) + (s.ended - s.began) * 1e3
    said = "; ".join(
        f"rank {rank}: " + ", ".join(f"{kind} {ms:.1f} ms" for (r, kind), ms in spent.items() if r == rank)
        for rank in ranks
    )
    picture = Picture(f"What each rank did. {title}. {said}.", (9, 0.8 + 0.75 * len(ranks)))
    ax = picture.subplots()
    for kind, (colour, hatch) in KINDS.items():
        for flight in (False, True):
            bars = [s for s in shown if s.kind == kind and s.flight == flight]
            if bars:
                ax.barh(
                    [s.rank + (0.4 if flight else 0) for s in bars], [(s.ended - s.began) * 1e3 for s in bars],
                    left=[s.began * 1e3 for s in bars], height=0.14 if flight else 0.6, facecolor=colour, hatch=hatch,
                    edgecolor="black", linewidth=0.3, label=None if flight else kind,
                )  # fmt: skip
    ax.set(xlim=(start_ms, stop), yticks=ranks, yticklabels=[f"rank {r}" for r in ranks], xlabel="ms", title=title)
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _bare(ax)
    return picture


def lanes(stages: int, requests: int, tokens: int = 4) -> Picture:
    """Who works on what while requests are decoded, if all ticks are alike: a column is a tick, a number a lane."""
    busy, turns = min(stages, requests), range(tokens)
    ticks = (tokens - 1) * stages + busy + stages - 1
    idle = 1 - tokens * busy / ticks
    picture = Picture(
        f"{stages} stage(s), {requests} request(s) in flight, {tokens} tokens each: {ticks} ticks, of which a stage works in "
        f"{tokens * busy}. The bubble is {idle:.2f}, {max(0, 1 - requests / stages):.2f} without filling and draining.",
        (8, 0.8 + 0.35 * stages),
    )
    ax = picture.subplots()
    for stage in range(stages):
        for lane in range(busy):
            for turn in turns:
                tick = lane + turn * stages + stage
                ax.barh(stage, 1, left=tick, height=0.9, **_style(stage))
                ax.text(tick + 0.5, stage, str(lane), fontsize=8, ha="center", va="center", bbox=_PLATE)
    ax.set(xlim=(0, ticks), ylim=(stages - 0.4, -0.6), xlabel="tick", yticks=range(stages))
    ax.set_yticklabels([f"stage {stage}" for stage in range(stages)])
    _bare(ax)
    return picture


def gains(
    links: Sequence[str], measured: Mapping[str, Sequence[float]], limits: Mapping[str, Sequence[float]]
) -> Picture:
    """How many times as fast as without overlap, over links: marks for what was `measured`, dashed lines for `limits`."""
    said = "; ".join(
        f"{name}: " + ", ".join(f"{gain:.2f} at {link}" for link, gain in zip(links, values, strict=True))
        for name, values in {**limits, **measured}.items()
    )
    picture = Picture(f"Gain of overlap over the link's rate. {said}.", (7, 3.2))
    ax = picture.subplots()
    for i, (name, values) in enumerate(limits.items()):
        ax.plot(
            range(len(links)), values, ("--", ":")[i % 2], color=_GREYS[i % 2], marker="_", markersize=14, label=name
        )
    for i, (name, values) in enumerate(measured.items()):
        beside = (i - (len(measured) - 1) / 2) * 0.1  # equal gains stay visible
        at = [x + beside for x in range(len(links))]
        ax.plot(at, values, "osD^"[i % 4], color=COLOURS[(5, 6, 2, 3)[i % 4]], markersize=8, label=f"{name}, measured")
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set(ylabel="gain (1: none)", xlabel="link", title="How many times as fast as without overlap")
    ax.set_xticks(range(len(links)), links)
    ax.margins(x=0.15, y=0.12)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _bare(ax)
    return picture


def expert_load(layers: Sequence[Mapping[str, Any]]) -> Picture:
    """Tokens that asked for each expert, layer by layer (`report["experts"]["layers"]`).

    Where several ranks share the experts, each cell names its rank, and right of a layer stands its busiest rank over the
    mean; else its busiest expert.
    """
    loads = [each["tokens"] for each in layers]
    spread = [each["placement"] if len(each.get("placement", ())) > 1 else None for each in layers]
    who = "rank" if any(spread) else "expert"
    worst = [
        busiest_over_mean(load, placed or [[e] for e in range(len(load))])
        for load, placed in zip(loads, spread, strict=True)
    ]
    names = [f"layer {each['layer']}" for each in layers]
    said = "; ".join(
        f"{name}: {', '.join(map(str, load))}, busiest {who} {ratio:.2f} times the mean"
        for name, load, ratio in zip(names, loads, worst, strict=True)
    )
    picture = Picture(f"Tokens for each expert. {said}.", (8, 1.2 + 0.42 * len(layers)))
    ax = picture.subplots()
    owners = [{e: f"  r{rank}" for rank, mine in enumerate(placed or []) for e in mine} for placed in spread]
    texts = [
        [f"{count:,}{owner.get(e, '')}" for e, count in enumerate(load)]
        for load, owner in zip(loads, owners, strict=True)
    ]
    shares = [[count * len(load) / max(sum(load), 1) for count in load] for load in loads]
    image = _heat_map(ax, shares, texts, max(2.0, *map(max, shares)))
    for row, ratio in enumerate(worst):
        ax.annotate(f"{ratio:.2f}", (len(loads[row]) - 0.35, row), va="center", fontsize=9, annotation_clip=False)
    ax.set(title=f"Tokens for each expert; right: busiest {who} / mean", xlabel="expert", aspect="auto")
    ax.set_yticks(range(len(layers)), names)
    picture.colorbar(image, ax=ax, label="times the layer's mean", pad=0.1)
    return picture


def byte_matrix(sent: Mapping[str, Sequence[Sequence[float]]]) -> Picture:
    """Bytes from each rank to each rank, by what was exchanged (`report["experts"]["bytes"]`); grey: stayed where it was.

    Raises ValueError if there is nothing to show: one rank, or an exchange that isn't "all_to_all".
    """
    if not sent:
        raise ValueError("nothing went from rank to rank: serve with several ranks and expert_exchange='all_to_all'")
    said = "; ".join(
        f"{what}: " + ", ".join(
            f"rank {a} to {b} {count / 1e3:.0f}" for a, row in enumerate(matrix) for b, count in enumerate(row)
        )
        for what, matrix in sent.items()
    )  # fmt: skip
    ranks = len(next(iter(sent.values())))
    size = (len(sent) * (1.7 + 0.5 * ranks), 1.5 + 0.5 * ranks)
    picture = Picture(f"kB from each rank to each rank; what is for itself stays. {said}.", size)
    top = max(n for matrix in sent.values() for a, row in enumerate(matrix) for b, n in enumerate(row) if a != b)
    for ax, (what, matrix) in zip(picture.subplots(1, len(sent), squeeze=False)[0], sent.items(), strict=True):
        leaves = [[0.0 if a == b else n for b, n in enumerate(row)] for a, row in enumerate(matrix)]
        texts = [["" if a == b else f"{n / 1e3:,.0f}" for b, n in enumerate(row)] for a, row in enumerate(matrix)]
        _heat_map(ax, leaves, texts, 1.3 * top or 1.0)
        for r in range(ranks):
            ax.add_patch(Rectangle((r - 0.5, r - 0.5), 1, 1, facecolor="#dddddd", edgecolor="white", hatch="///"))
            ax.text(r, r, f"{matrix[r][r] / 1e3:,.0f}", fontsize=8, ha="center", va="center", bbox=_PLATE)
        ax.set(title=f"{what}, kB", xlabel="to rank", ylabel="from rank", yticks=range(ranks))
        ax.title.set_fontsize(9)
    return picture


def _sum(terms: Mapping[str, float], unit: str) -> str:
    return f"{sum(terms.values()):.3g} {unit} (" + ", ".join(f"{name} {size:.3g}" for name, size in terms.items()) + ")"


def _stacked(ax: Axes, bars: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Bars from left to right, one below the other, each a sum of terms; a term looks the same in all of them."""
    terms = list(dict.fromkeys(term for own in bars.values() for term in own))
    base = [0.0] * len(bars)
    for i, term in enumerate(terms):
        grey, hatch = _TERMS[i % len(_TERMS)]
        sizes = [own.get(term, 0.0) for own in bars.values()]
        ax.barh(
            range(len(bars)), sizes, left=base, height=0.7, label=term, facecolor=grey, hatch=hatch,
            edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        base = [b + size for b, size in zip(base, sizes, strict=True)]
    for row, end in enumerate(base):
        ax.annotate(
            f"{end:.3g} {unit}", (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8, zorder=4
        )
    ax.set_yticks(range(len(bars)), list(bars))
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, 1.15 * max(base, default=1.0))
    _bare(ax)


def _room(ax: Axes, room: float) -> None:
    ax.axvline(room, color="#D55E00", linestyle="--", linewidth=1.5, zorder=3)
    ax.annotate(f"room: {room:.0f} GB", (room, -0.6), fontsize=8, ha="center", va="bottom", color="#D55E00")


def _heat_map(ax: Axes, values: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], top: float) -> AxesImage:
    """Cells as dark as their value, with a text in each; `top` is the darkest."""
    image = ax.imshow(values, cmap="Blues", vmin=0, vmax=top)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            ink = "white" if value > 0.55 * top else "black"
            ax.text(x, y, texts[y][x], fontsize=8, ha="center", va="center", color=ink)
    ax.set_xticks(range(len(values[0])))
    _bare(ax)
    return image


def _bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
