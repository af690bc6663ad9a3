"""Collectives timed over message sizes, and what a latency and a bandwidth explain of it: tidy frames, one row per point.

Sizes and bandwidths are defined as nccl-tests does (doc/PERFORMANCE.md there): the size of an all-gather or reduce-scatter is
that of the whole tensor; algbw = size / time; busbw = algbw x 2(n-1)/n for an all-reduce, (n-1)/n for an all-gather,
reduce-scatter or all-to-all, 1 otherwise, which makes it comparable with the speed of a link. GB = 1e9 bytes.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from labkit.comm import Comm
from labkit.launch.local import RankGroup, oversubscribed
from labkit.links import Link, measured_gbit
from labkit.parallel.all_reduce import ALGORITHMS

SIZES = tuple(2**k for k in range(8, 27))  # 256 B to 64 MiB
PATHS = ("shared memory", "sockets")
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_all_uneven", "broadcast", "send_recv")
_BUS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    **dict.fromkeys(("all_gather", "reduce_scatter", "all_to_all", "all_to_all_uneven"), lambda n: (n - 1) / n),
    **dict.fromkeys(("broadcast", "send_recv"), lambda n: 1.0),
    **dict.fromkeys(ALGORITHMS, lambda n: 2 * (n - 1) / n),
}


def sweep(
    ranks: Sequence[int] = (2, 3, 4), ops: Sequence[str] = OPS, sizes: Sequence[int] = SIZES, *,
    paths: Sequence[str] = PATHS, link: Link | str | None = None, seconds: float = 0.1,
) -> pd.DataFrame:  # fmt: skip
    """Times each operation for each size (bytes), number of ranks, and path between them.

    Args:
        ops: of `OPS`, or "ring", "one-shot", "two-shot" (`labkit.parallel.all_reduce`).
        paths: "shared memory" and "sockets" (between GPUs symmetric memory, and NCCL under its own name). Sends always
            take the sockets, and so does all with a link.
        seconds: how long to repeat each point, after a warm-up; at least 7 calls.

    Returns a row for each point: op, ranks, path, bytes, calls, median_us, p95_us, algbw_gb_s, busbw_gb_s, oversubscribed,
    link (asked), link_gbit_per_s (measured). Times are those of the slowest rank. Raises ValueError for what isn't there.
    """
    link = Link.parse(link) if isinstance(link, str) else link
    for kind, given, legal in (("operation", ops, _BUS), ("path", paths, PATHS)):
        if wrong := set(given) - set(legal):
            raise ValueError(f"no {kind} {', '.join(map(repr, sorted(wrong)))}: use {', '.join(legal)}")
    if min(ranks, default=0) < 2 or min(sizes, default=0) < 64:
        raise ValueError(f"ranks={list(ranks)}: use 2 or more; sizes={list(sizes)}: 64 bytes or more")
    rows = []
    for n in ranks:
        for path in paths if link is None else ["sockets"]:
            those = [op for op in ops if path == "sockets" or op not in ("send_recv", "ring")]
            with RankGroup(
                _measure, n, args=(those, tuple(sizes), seconds, link), threads=1, link=link,
                shared_memory=path == "shared memory", collective_timeout=60,
            ) as group:  # fmt: skip
                for row in group.receive()[1]:  # without shared memory there is nothing to show of it
                    if (row["path"] == PATHS[0]) == (path == PATHS[0]):
                        rows.append(row | {"oversubscribed": oversubscribed(n), "link": group.link_label})
    return pd.DataFrame(rows)


def _measure(comm: Comm, channel: Any, ops: Sequence[str], sizes: Sequence[int], seconds: float, link: Any) -> None:
    """On each rank: all points; rank 0 sends the rows."""
    n, rows = comm.world_size, []
    path = PATHS[0] if "tp" in comm.shared else "NCCL" if comm.mesh.backend == "nccl" else PATHS[1]
    rate = measured_gbit(comm, megabytes=4) if link else None
    for op in ops:
        for size in sizes:
            call, per_call = _prepare(comm, op, size)
            times = _repeat(comm, call, seconds)
            slowest = np.max(comm.gather_objects(times), axis=0) / per_call
            median, p95 = np.median(slowest), np.quantile(slowest, 0.95)
            rows.append({
                "op": op, "ranks": n, "path": path, "bytes": size, "calls": len(times), "median_us": median * 1e6,
                "p95_us": p95 * 1e6, "algbw_gb_s": size / median / 1e9, "busbw_gb_s": size / median / 1e9 * _BUS[op](n),
                "link_gbit_per_s": rate,
            })  # fmt: skip
    if comm.rank == 0:
        channel.send(rows)


def _repeat(comm: Comm, call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call; all ranks make the same number of them."""

    def timed(calls: int) -> list[float]:
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            call()
            if comm.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return times

    slow = max(comm.gather_objects(min(timed(3))))
    calls = int(min(max(7, seconds / slow), 2000))
    timed(min(calls // 5, 100))
    comm.barrier()
    return timed(calls)


def _prepare(comm: Comm, op: str, size: int) -> tuple[Callable[[], Any], int]:
    """What to call, on tensors that make `size` bytes of operation `op`; and how many operations that is."""
    n, me = comm.world_size, comm.rank
    device, count = comm.device, max(size // 4, n)  # float32
    if op == "all_reduce" or op in ALGORITHMS:
        x = torch.zeros(count, device=device)
        return (lambda: comm.all_reduce(x, "tp")) if op == "all_reduce" else (lambda: ALGORITHMS[op](x, comm, "tp")), 1
    if op == "all_gather":
        part = torch.zeros(count // n, device=device)
        return lambda: comm.all_gather(part, "tp"), 1
    if op == "reduce_scatter":
        whole = torch.zeros(count // n * n, device=device)
        return lambda: comm.reduce_scatter(whole, "tp"), 1
    if op.startswith("all_to_all"):
        # Uneven: rank r sends its i-th neighbour a share that grows with i and with r, like experts of uneven popularity.
        share = [[1 + (i + r) % n if op.endswith("uneven") else 1 for i in range(n)] for r in range(n)]
        rows = [[count * s // sum(shares) for s in shares] for shares in share]
        sent, received = rows[me], [rows[r][me] for r in range(n)]
        x = torch.zeros(sum(sent), device=device)
        return lambda: comm.all_to_all(x, sent, received, "tp"), 1
    x = torch.zeros(count, device=device)
    if op == "broadcast":  # from each rank in turn, or a source would run ahead of who receives

        def round_of_broadcasts() -> None:
            for source in range(n):
                comm.broadcast(x, source, "tp")

        return round_of_broadcasts, n

    def ping_pong() -> None:  # between ranks 0 and 1
        if me == 0:
            comm.send(x, 1, "tp")
            comm.recv(x, 1, "tp")
            comm.flush()
        elif me == 1:
            comm.recv(x, 0, "tp")
            comm.send(x, 0, "tp")
            comm.flush()

    return ping_pong, 2


# -- latency and bandwidth -----------------------------------------------------------------------------------------------


def fit(sizes: Sequence[float], micros: Sequence[float], regimes: int = 2) -> list[tuple[float, float, float]]:
    """Lines t = alpha + bytes / beta through measured times, by least squares of relative errors.

    Two regimes, where there are eight points or more, because protocols and caches change with the size; the border is where
    the fit is best. Returns (from bytes, alpha in us, beta in GB/s) for each regime, in order of size.
    """
    x, y = np.asarray(sizes, float), np.asarray(micros, float)
    order = np.argsort(x)
    x, y = x[order], y[order]

    def line(part: slice) -> tuple[float, float, float]:  # alpha, slope, squared relative error
        a, b = np.stack([1 / y[part], x[part] / y[part]], axis=1), np.ones(len(y[part]))
        (alpha, slope), *_ = np.linalg.lstsq(a, b, rcond=None)
        if slope < 0:  # a plateau
            alpha, slope = np.sum(a[:, 0]) / np.sum(a[:, 0] ** 2), 0.0
        elif alpha < 0:  # time grows faster than size, as when a message outgrows a cache
            alpha, slope = 0.0, np.sum(a[:, 1]) / np.sum(a[:, 1] ** 2)
        return float(alpha), float(slope), float(np.sum((a @ [alpha, slope] - b) ** 2))

    borders = range(3, len(x) - 2) if regimes == 2 and len(x) >= 8 else []
    options = [[slice(0, len(x))], *([slice(0, i), slice(i, len(x))] for i in borders)]
    best = min(options, key=lambda parts: sum(line(part)[2] for part in parts))
    fits = [(float(x[part][0]), *line(part)[:2]) for part in best]
    return [(start, alpha, 1e-3 / slope if slope else float("inf")) for start, alpha, slope in fits]


def predict(fitted: Sequence[tuple[float, float, float]], size: float) -> float:
    """Microseconds that `fit`'s lines give for a message of `size` bytes."""
    _, alpha, beta = next((f for f in reversed(fitted) if size >= f[0]), fitted[0])
    return alpha + size / beta / 1e3


def fits(frame: pd.DataFrame) -> pd.DataFrame:
    """For each op, number of ranks and path of a sweep: the lines, and how they do on sizes that they have not seen.

    They are fitted on every other size and judged on the rest. Returns op, ranks, path, alpha_us and beta_gb_s (of the small
    messages' regime), large_from_bytes, large_alpha_us, large_beta_gb_s, residual (median relative error on the sizes that
    were fitted), held_out (on the others).
    """
    rows = []
    for (op, ranks, path), group in frame.groupby(["op", "ranks", "path"], sort=False):
        group = group.sort_values("bytes")
        seen, unseen = group.iloc[::2], group.iloc[1::2]
        lines = fit(seen["bytes"], seen["median_us"])

        def error(part: pd.DataFrame, lines: Any = lines) -> float:
            guesses = np.array([predict(lines, size) for size in part["bytes"]])
            return float(np.median(np.abs(guesses / part["median_us"].to_numpy() - 1)))

        large = lines[-1]
        rows.append({
            "op": op, "ranks": ranks, "path": path, "alpha_us": lines[0][1], "beta_gb_s": lines[0][2],
            "large_from_bytes": large[0], "large_alpha_us": large[1], "large_beta_gb_s": large[2],
            "residual": error(seen), "held_out": error(unseen) if len(unseen) else float("nan"),
        })  # fmt: skip
    return pd.DataFrame(rows)
