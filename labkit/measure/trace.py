"""A trace of one run: what each rank did when, put together from what every rank's `Comm` kept (`LLM(trace=True)`).

A rank's time falls into computing, the operations of each axis, waiting (inside an operation that another rank of the group
had not reached yet) and bubbles (waiting for another pipeline stage). What went on beside its work is a second row.
Clocks of ranks are one on one host, and cannot be compared between hosts.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from labkit.comm import Event
from labkit.mesh import Layout


class Span(NamedTuple):
    """Something that a rank did. Times in seconds from the start of the trace.

    kind: "compute", "waiting", "bubble", or an axis ("tp", "pp", "dp") whose operation moved data; flight: beside the work.
    """

    rank: int
    kind: str
    name: str
    began: float
    ended: float
    flight: bool = False


def spans(events: Sequence[Sequence[Event]], layout: Layout) -> list[Span]:
    """Spans of all ranks, from each rank's events in rank order (`LLM.trace()`)."""
    start = min((e.began for rank in events for e in rank), default=0.0)
    out: list[Span] = []
    for rank, mine in enumerate(events):
        entered = _all_here(rank, events, layout)
        now = start  # whatever a rank does before its first operation is computing
        for event, others in zip(mine, entered, strict=True):
            kind, op, axis, phase, what, began, ended = event
            name = f"{phase} {op} {what}".strip()
            if kind == "flight":
                out.append(Span(rank, axis, name, began, ended, flight=True))
                continue
            if began > now:
                out.append(Span(rank, "compute", phase, now, began))
            now = ended
            idle = "bubble" if axis == "pp" else "waiting"
            ready = min(max(others, began), ended)
            out += [Span(rank, idle, name, began, ready)] if ready > began else []
            out += [Span(rank, axis, name, ready, ended)] if ended > ready else []
    moved = (s._replace(began=s.began - start, ended=s.ended - start) for s in out)
    return sorted(moved, key=lambda s: (s.rank, s.flight, s.began))


def _all_here(rank: int, events: Sequence[Sequence[Event]], layout: Layout) -> Iterable[float]:
    """For each event of `rank`, when the last of those that it needed entered: its group, or the sender."""
    times: dict[tuple[int, str, bool], list[float]] = defaultdict(list)
    for r, theirs in enumerate(events):
        for event in theirs:
            if event.op == "send" or (event.kind == "call" and event.op != "recv"):
                times[r, event.axis, event.op == "send"].append(event.began)
    seen: dict[tuple[str, bool], int] = defaultdict(int)
    for event in events[rank]:
        if event.kind != "call":
            yield event.began
            continue
        received = event.op == "recv"
        number = seen[event.axis, received]
        seen[event.axis, received] += 1
        peers = layout.peers(rank, event.axis)
        needed = [peers[peers.index(rank) - 1]] if received else peers
        lists = [times[r, event.axis, received] for r in needed]
        yield max((t[number] for t in lists if number < len(t)), default=event.began)


def chrome(trace: Sequence[Span]) -> dict[str, Any]:
    """The trace as a JSON object for Perfetto (ui.perfetto.dev) or chrome://tracing: a process for each rank."""
    ranks = sorted({span.rank for span in trace})
    names = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}} for rank in ranks
    ] + [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": int(flight), "args": {"name": text}}
        for rank in ranks for flight, text in ((False, "work"), (True, "beside it"))
    ]  # fmt: skip
    slices = [
        {
            "ph": "X", "pid": span.rank, "tid": int(span.flight), "cat": span.kind,
            "name": span.kind if span.kind == "compute" else f"{span.kind}: {span.name}",
            "ts": span.began * 1e6, "dur": (span.ended - span.began) * 1e6,
        }
        for span in trace
    ]  # fmt: skip
    return {"traceEvents": names + slices, "displayTimeUnit": "ms"}
