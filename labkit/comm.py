"""Every byte that crosses between ranks goes through here, and is counted.

`Comm` is the only caller of torch.distributed's operations. It counts each one (operation, axis, phase, what it carries,
calls, payload and wire bytes, time), numbers them, and says in plain words which operation failed, and on whom it waited.
Collectives among the ranks of one host go through memory that they share where they can (`labkit.shm`, `labkit.symmetric`).
It knows nothing of models.

payload = bytes of the tensor that this rank hands in. wire = bytes that this rank sends, for the bandwidth-optimal (ring)
algorithm: all-reduce 2(n-1)/n, reduce-scatter (n-1)/n, all-gather (n-1) times the payload (Thakur et al. 2005,
doi:10.1177/1094342005051521); a broadcast is counted once, at its source; point to point is what is sent.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from labkit.links import Link
from labkit.mesh import Mesh
from labkit.shm import SharedMemory, Sums
from labkit.symmetric import SymmetricMemory

# torch 2.13 renamed these two; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CommError(RuntimeError):
    """A collective or a transfer that failed or timed out, with its number, axis, and the ranks it waited for."""


@dataclass
class Tally:
    """What was counted for one kind of operation: calls, bytes, and seconds from entering to leaving it (waiting included).

    Of operations that go on while the rank works, `seconds` is only what it was kept waiting; `hidden_seconds` the rest.
    """

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0
    hidden_seconds: float = 0.0
    host_seconds: float = 0.0
    sent_to: list[int] | None = None  # all-to-all: bytes for each rank of the axis, itself included
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add(self, calls: int, payload: int, wire: int) -> None:
        """Counts calls of so many bytes each."""
        self.calls += calls
        self.payload_bytes += calls * payload
        self.wire_bytes += calls * wire

    @property
    def seconds(self) -> float:
        """Time on the device for NCCL (waits for it to finish), on the host for gloo."""
        for start, stop in self.events:
            stop.synchronize()
            self.host_seconds += start.elapsed_time(stop) / 1e3
        self.events.clear()
        return self.host_seconds


class Board(Protocol):
    """Where a rank writes what it is doing, so that somebody else can read it when the rank no longer answers."""

    address: int  # of number, time and waiting, where C writes them

    def write(self, number: int, waiting: bool, text: str) -> None: ...


class Event(NamedTuple):
    """One operation on this rank's clock, for a trace; times in seconds (time.perf_counter, one clock for all of a host).

    kind: "call" (the rank was inside it all the time), "flight" (it went on beside the rank's work), "start" of one or "wait" for
    its end.
    """

    kind: str
    op: str
    axis: str
    phase: str
    what: str
    began: float
    ended: float


class Pending:
    """A collective under way: `wait()` gives its result."""

    def __init__(self, finish: Callable[[], torch.Tensor]) -> None:
        self._finish = finish

    def wait(self) -> torch.Tensor:
        return self._finish()


class Exchange(NamedTuple):
    """A point at which a computation needs other ranks: an operation of `Comm` and its arguments."""

    op: str
    x: torch.Tensor
    axis: str
    what: str


# A computation that yields at such points, is sent what the operation gave, and returns its result.
Forward = Generator[Exchange, torch.Tensor, torch.Tensor]


class Comm:
    """This rank's communication. Tensors are contiguous; a group of one rank returns at once and counts nothing.

    Args:
        mesh: the process grid; an `axis` below is one of its axes ("tp", "pp", "dp", "ep", "replica", "world").
        meter: count operations (`tallies`); off, the cost is one test per call.
        timed: also time them; off for fake tensors, where there is no clock to read.
        board: where to write what is being waited for.
        shared: by axis, the memory that a group on one host shares (`labkit.shm.join`, on GPUs `labkit.symmetric.join`).
        link: a slow link to imitate in software: each operation takes at least the time that its wire bytes would.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        meter: bool = True,
        timed: bool = True,
        board: Board | None = None,
        shared: Mapping[str, SharedMemory | SymmetricMemory] | None = None,
        link: Link | None = None,
    ) -> None:
        self.mesh = mesh
        self.rank, self.world_size, self.device = mesh.rank, mesh.world_size, mesh.device
        self.meter, self.timed, self.board = meter, timed, board
        self.shared, self.link = shared or {}, link
        self.phase = ""  # "prefill" or "decode", set by whoever knows
        self.tallies: dict[tuple[str, str, str, str], Tally] = {}
        self.events: list[Event] | None = None  # a list: keep them
        self.number = 0  # of the last operation begun on this rank
        # gloo moves host memory: where ranks share a GPU, tensors go through the host and back.
        self._staged = mesh.backend == "gloo" and mesh.device.type == "cuda"
        self._on_device = mesh.backend == "nccl"
        self._on_cpu = mesh.device.type == "cpu"
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._hidden_until = 0.0  # up to when time has been counted as hidden
        self._link_free = 0.0  # when an imitated link has carried all that it was given

    # -- collectives ---------------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, axis: str = "world", what: str = "") -> torch.Tensor:
        """Sum of `x` over the ranks of `axis`, in place and returned; the same bits on every rank."""
        n = self.mesh.size(axis)
        if n == 1:
            return x
        y = self._stage(x)
        shared = self._shared("all_reduce", axis, y)
        wire = _all_reduce_wire(y, n)

        def reduce(group: dist.ProcessGroup | None) -> None:
            if shared:
                shared.all_reduce(y)
            else:
                dist.all_reduce(y, group=group)

        self._do("all_reduce", axis, what, y.nbytes, wire, reduce)
        return _written(x, y)

    def all_reduce_start(self, x: torch.Tensor, axis: str = "world", what: str = "") -> Pending:
        """`all_reduce` that goes on while this rank works. Through shared memory the rank has to do it itself, at once."""
        n = self.mesh.size(axis)
        if n == 1 or self._shared("all_reduce", axis, x):
            self.all_reduce(x, axis, what)
            return Pending(lambda: x)
        y = self._stage(x)
        wire = _all_reduce_wire(y, n)

        def start(group: dist.ProcessGroup | None) -> dist.Work:
            return dist.all_reduce(y, group=group, async_op=True)

        return self._begin("all_reduce", axis, what, y.nbytes, wire, start, lambda: _written(x, y))

    def can_reduce_in_c(self, x: torch.Tensor, axis: str) -> bool:
        """Whether `all_reduces_in_c` can add up tensors like `x`; alike on all ranks of `axis`. It imitates no link and keeps no
        events."""
        alone = self.mesh.size(axis) == 1
        plain = self._on_cpu and self.link is None and self.events is None
        return alone or (plain and self._shared("all_reduce", axis, x) is not None)

    def all_reduces_in_c(
        self, x: torch.Tensor, axis: str, whats: tuple[str, str], times: int, call: Callable[[Sums | None], int]
    ) -> None:
        """Runs `call`, C code that adds up tensors like `x` by itself, `times` for each of `whats`, in turn, and counts that."""
        n = self.mesh.size(axis)
        if n == 1:
            call(None)
            return
        shared, text, began = self.shared[axis], _describe("all_reduce", axis, " or ".join(whats)), time.perf_counter()
        if self.board is not None:
            self.board.write(self.number, False, text)
        assert isinstance(shared, SharedMemory), "can_reduce_in_c said so"
        sums = shared.sums(x, self.number, self.board.address if self.board else None)
        code, self.number = call(sums), sums.number
        try:
            shared.check(code)
        except RuntimeError as error:
            raise self._error(text, axis, began, error) from error
        if self.meter:
            for what, seconds in zip(whats, sums.seconds, strict=True):
                tally = self._tally("all_reduce", axis, what)
                tally.add(times, x.nbytes, _all_reduce_wire(x, n))
                tally.host_seconds += seconds

    def all_gather(self, x: torch.Tensor, axis: str = "world", what: str = "") -> torch.Tensor:
        """`x` of every rank of `axis`, stacked in rank order: shape (n, *x.shape). All shapes must be equal."""
        n = self.mesh.size(axis)
        if n == 1:
            return x.unsqueeze(0)
        y = self._stage(x).contiguous()
        out = torch.empty((n, *y.shape), dtype=y.dtype, device=y.device)
        shared = self._shared("all_gather", axis, y)

        def gather(group: dist.ProcessGroup | None) -> None:
            if shared:
                shared.all_gather(y, out)
            else:
                _all_gather(out.view(-1), y.view(-1), group=group)

        self._do("all_gather", axis, what, y.nbytes, (n - 1) * y.nbytes, gather)
        return out.to(x.device)

    def reduce_scatter(self, x: torch.Tensor, axis: str = "world", what: str = "") -> torch.Tensor:
        """Sum of `x` (n * k, ...) over the ranks of `axis`; this rank gets rows [index * k, (index + 1) * k)."""
        n = self.mesh.size(axis)
        if n == 1:
            return x
        if x.shape[0] % n:
            raise ValueError(f"reduce_scatter of {x.shape[0]} rows over {n} ranks: rows must be a multiple of {n}")
        y = self._stage(x)
        out = torch.empty((x.shape[0] // n, *x.shape[1:]), dtype=y.dtype, device=y.device)
        shared = self._shared("reduce_scatter", axis, y)

        def reduce(group: dist.ProcessGroup | None) -> None:
            if shared:
                shared.reduce_scatter(y, out)
            else:
                _reduce_scatter(out, y, group=group)

        self._do("reduce_scatter", axis, what, y.nbytes, (n - 1) * y.nbytes // n, reduce)
        return out.to(x.device)

    def all_to_all(
        self, x: torch.Tensor, send_rows: list[int], recv_rows: list[int], axis: str = "world", what: str = ""
    ) -> torch.Tensor:
        """Rows of `x`, `send_rows[i]` of them to the i-th rank of `axis`; returns `recv_rows[i]` rows from each, in order."""
        n = self.mesh.size(axis)
        if not len(send_rows) == len(recv_rows) == n or sum(send_rows) != len(x) or min(*send_rows, *recv_rows) < 0:
            raise ValueError(
                f"all_to_all of {len(x)} rows over {n} ranks: send_rows={send_rows} must be {n} numbers that add up to them, "
                f"recv_rows={recv_rows} {n} numbers"
            )
        if n == 1:
            return x
        y = self._stage(x)
        out = torch.empty((sum(recv_rows), *x.shape[1:]), dtype=y.dtype, device=y.device)
        row = y.nbytes // max(len(x), 1)
        wire = row * (sum(send_rows) - send_rows[self.mesh.index(axis)])
        shared = self._shared("all_to_all", axis, y)

        def exchange(group: dist.ProcessGroup | None) -> None:
            if shared:
                shared.all_to_all(y, out, send_rows, recv_rows)
            else:
                dist.all_to_all_single(out, y, recv_rows, send_rows, group=group)

        self._do("all_to_all", axis, what, y.nbytes, wire, exchange)
        if self.meter:
            tally = self.tallies["all_to_all", axis, self.phase, what]
            before = tally.sent_to or [0] * len(send_rows)
            tally.sent_to = [sent + row * rows for sent, rows in zip(before, send_rows, strict=True)]
        return out.to(x.device)

    def broadcast(self, x: torch.Tensor, source: int, axis: str = "world", what: str = "") -> torch.Tensor:
        """`x` of the `source`-th rank of `axis`, written into `x` on the others, and returned."""
        if self.mesh.size(axis) == 1:
            return x
        src = self.mesh.peers(axis)[source]
        y = self._stage(x)
        shared = self._shared("broadcast", axis, y)

        def spread(group: dist.ProcessGroup | None) -> None:
            if shared:
                shared.broadcast(y, source)
            else:
                dist.broadcast(y, src=src, group=group)

        self._do("broadcast", axis, what, y.nbytes, y.nbytes if src == self.rank else 0, spread)
        return _written(x, y)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank of the world, in rank order (pickled; for reports, not for tensors; not counted)."""
        out: list[Any] = [None] * self.world_size

        def gather(group: dist.ProcessGroup | None) -> None:
            dist.all_gather_object(out, value, group=group)

        self._do("all_gather", "world", "", 0, 0, gather, kind="uncounted")
        return out

    def barrier(self) -> None:
        """Returns when every rank of the world has arrived."""
        self._do("barrier", "world", "", 0, 0, lambda group: dist.barrier(group=group), kind="uncounted")

    # -- point to point ------------------------------------------------------------------------------------------------

    def send(self, x: torch.Tensor, to: int, axis: str = "world", what: str = "") -> None:
        """Sends `x` to the `to`-th rank of `axis` without waiting for it to be received.

        `x` must not be changed after: gloo reads it when the receiver is ready. It is kept until `flush`.
        """
        y = self._stage(x).contiguous()
        dst = self.mesh.peers(axis)[to]

        def start(group: dist.ProcessGroup | None) -> Any:
            return dist.isend(y, dst=dst, group=group)

        work = self._do("send", axis, what, y.nbytes, y.nbytes, start, kind="start")
        self._sending.append((work, y))

    def recv(self, x: torch.Tensor, source: int, axis: str = "world", what: str = "") -> torch.Tensor:
        """Waits for what the `source`-th rank of `axis` sends, writes it into `x` and returns it.

        The time goes to the "send" of the same axis and kind; calls and bytes are the sender's.
        """
        return self.recv_start(x, source, axis, what).wait()

    def recv_start(self, x: torch.Tensor, source: int, axis: str = "world", what: str = "") -> Pending:
        """`recv` that begins while this rank works: gloo's sender begins when it is expected. (NCCL's begins when waited for,
        or it would keep a part of the GPU busy with waiting.)"""
        y = self._stage(x)
        src = self.mesh.peers(axis)[source]

        def start(group: dist.ProcessGroup | None) -> dist.Work | None:
            return dist.irecv(y, src=src, group=group)

        work = None if self._on_device else self._do("recv", axis, what, 0, 0, start, kind="uncounted")

        def land(group: dist.ProcessGroup | None) -> None:
            if self._on_device:
                dist.recv(y, src=src, group=group)
            elif work:  # dist.recv would wait for ever on gloo's default group
                work.wait(timedelta(seconds=self.mesh.timeout))

        def finish() -> torch.Tensor:
            self._do("recv", axis, what, y.nbytes, y.nbytes, land, kind="recv")
            return _written(x, y)

        return Pending(finish)

    def flush(self, keep: int = 0) -> None:
        """Waits until everything sent has left, but for the last `keep` tensors. (gloo tells only who waits that one has.)"""
        while len(self._sending) > keep:
            work, _ = self._sending.popleft()
            work.wait()

    # -- metering ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets what was counted."""
        self.tallies.clear()
        if self.events is not None:
            self.events = []

    @contextmanager
    def apart(self) -> Iterator[dict[tuple[str, str, str, str], Tally]]:
        """Counts what is done meanwhile by itself, and gives that: what a CUDA graph records, to be repeated."""
        kept, self.tallies = self.tallies, {}
        try:
            yield self.tallies
        finally:
            self.tallies = kept

    def repeated(self, recorded: Mapping[tuple[str, str, str, str], Tally], times: int) -> None:
        """Counts what was `recorded` as done `times` times, each of which took as long as the last."""
        for key, once in recorded.items():
            tally = self.tallies.setdefault(key, Tally())
            tally.calls += times * once.calls
            tally.payload_bytes += times * once.payload_bytes
            tally.wire_bytes += times * once.wire_bytes
            for start, stop in once.events:
                stop.synchronize()
                tally.host_seconds += times * start.elapsed_time(stop) / 1e3

    def _stage(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cpu != self._on_cpu:  # NCCL would fail far from here, a fake process group not at all
            raise ValueError(
                f"a {x.device.type} tensor {tuple(x.shape)} was handed to a rank that works on {self.device}"
            )
        return x.cpu() if self._staged else x

    def _shared(self, op: str, axis: str, x: torch.Tensor) -> Any:
        """What memory `axis` shares, if that does `op` on `x`: alike on all ranks of the group."""
        shared = self.shared.get(axis)
        return shared if shared and shared.takes(op, x) else None

    def _begin(
        self, op: str, axis: str, what: str, payload: int, wire: int,
        start: Callable[[dist.ProcessGroup | None], dist.Work], result: Callable[[], torch.Tensor],
    ) -> Pending:  # fmt: skip
        """Starts an operation that goes on by itself; its tally learns when it ended, and for how long nobody waited."""
        phase, began = self.phase, time.perf_counter()
        work = self._do(op, axis, what, payload, wire, start, kind="start")
        started = time.perf_counter()
        due = self._due(axis, began, wire)
        watched = self.meter and self.timed and not self._on_device
        ended: list[float] = []
        if watched:
            work.get_future().add_done_callback(lambda _: ended.append(time.perf_counter()))

        def land(group: dist.ProcessGroup | None) -> None:
            work.wait()
            if due:
                time.sleep(max(0.0, due - time.perf_counter()))

        def finish() -> torch.Tensor:
            waiting, later = time.perf_counter(), self.phase
            self.phase = phase  # that of its start, whatever came after
            self._do(op, axis, what, 0, 0, land, kind="wait")
            self.phase = later
            if watched:
                landed = max(due, ended[0] if ended else time.perf_counter())
                tally = self.tallies.setdefault((op, axis, phase, what), Tally())
                # Of flights that are under way together, each moment counts once.
                hidden_from, hidden_to = max(started, self._hidden_until), min(waiting, landed)
                tally.hidden_seconds += max(0.0, hidden_to - hidden_from)
                self._hidden_until = max(self._hidden_until, hidden_to)
                if self.events is not None:
                    self.events.append(Event("flight", op, axis, phase, what, began, landed))
            return result()

        return Pending(finish)

    def _due(self, axis: str, began: float, wire: int) -> float:
        """When an imitated link has carried `wire` bytes more, one after the other; 0 if they don't cross it."""
        if self.link is None or len({rank // self.link.ranks_per_host for rank in self.mesh.peers(axis)}) == 1:
            return 0.0
        self._link_free = max(self._link_free, began) + self.link.seconds(wire)
        return self._link_free

    def _do(
        self, op: str, axis: str, what: str, payload: int, wire: int, call: Callable[[dist.ProcessGroup | None], Any],
        *, kind: str = "call",
    ) -> Any:  # fmt: skip
        """Runs `call` on the group of `axis`, numbered, counted and timed.

        kind: "call"; "start" and "wait", the two ends of a flight (calls and bytes are counted at its start); "recv", the
        other end of a send, of which only the time counts; "uncounted".
        """
        self.number += 1
        text = _describe(op, axis, what)
        if self.board is not None:
            self.board.write(self.number, True, text)
        began = time.perf_counter()
        on_device = self._on_device and self.timed and self.meter
        if on_device:
            again = torch.cuda.is_current_stream_capturing()  # then each repetition records them
            start, stop = (torch.cuda.Event(enable_timing=True, external=again) for _ in range(2))
            start.record()
        try:
            result = call(self.mesh.group("pp_hops" if axis == "pp" and op in ("send", "recv") else axis))
        except (RuntimeError, ValueError) as error:
            raise self._error(text, axis, began, error) from error
        if self.link and kind in ("call", "recv"):
            # What is received sets out when it is there, or earlier: nobody knows.
            sets_out = began if kind == "call" else time.perf_counter()
            time.sleep(max(0.0, self._due(axis, sets_out, wire) - time.perf_counter()))
        if self.meter and kind != "uncounted":
            tally = self._count(op, axis, what, payload, wire, kind, began)
            if on_device:
                stop.record()
                tally.events.append((start, stop))
        if self.board is not None:
            self.board.write(self.number, False, text)
        return result

    def _error(self, text: str, axis: str, began: float, error: Exception) -> CommError:
        others = [r for r in self.mesh.peers(axis) if r != self.rank]
        return CommError(
            f"rank {self.rank}: {text} (its operation {self.number}) failed after {time.perf_counter() - began:.1f} s "
            f"with rank(s) {others}: {str(error).splitlines()[0]}"
        )

    def _tally(self, op: str, axis: str, what: str) -> Tally:
        key = op, axis, self.phase, what
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = Tally()
        return tally

    def _count(self, op: str, axis: str, what: str, payload: int, wire: int, kind: str, began: float) -> Tally:
        tally = self._tally("send" if op == "recv" else op, axis, what)
        if kind in ("call", "start"):
            tally.add(1, payload, wire)
        if self.timed and not self._on_device:
            ended = time.perf_counter()
            tally.host_seconds += ended - began
            if self.events is not None:
                kind = "call" if kind == "recv" else kind
                self.events.append(Event(kind, op, axis, self.phase, what, began, ended))
        return tally


def _all_reduce_wire(x: torch.Tensor, n: int) -> int:
    return 2 * (n - 1) * x.nbytes // n


def _written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`x` with what came into `y`, its copy on the host where there is one (`Comm._stage`), else `x` itself."""
    return x.copy_(y) if y is not x else x


@cache
def _describe(op: str, axis: str, what: str) -> str:
    return f"{op} of {what} on axis {axis}" if what else f"{op} on axis {axis}"
