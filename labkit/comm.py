"""Every byte that crosses between ranks goes through here, and is counted.

`Comm` is the only caller of torch.distributed's operations. It counts each one (operation, axis, phase, what it carries,
calls, payload and wire bytes, time), numbers them, and says in plain words which operation failed, and on whom it waited.
It knows nothing of models.

payload = bytes of the tensor that this rank hands in. wire = bytes that this rank sends, for the bandwidth-optimal (ring)
algorithm: all-reduce 2(n-1)/n, reduce-scatter (n-1)/n, all-gather (n-1) times the payload (Thakur et al. 2005,
doi:10.1177/1094342005051521); a broadcast is counted once, at its source; point to point is what is sent.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from labkit.mesh import Mesh

# torch 2.13 renamed these two; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CommError(RuntimeError):
    """A collective or a transfer that failed or timed out, with its number, axis, and the ranks it waited for."""


@dataclass
class Tally:
    """What was counted for one kind of operation: calls, bytes, and seconds from entering to leaving it (waiting included)."""

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0
    host_seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

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

    def write(self, number: int, waiting: bool, text: str) -> None: ...


class Pending:
    """A collective under way: `wait()` gives its result."""

    def __init__(self, finish: Callable[[], torch.Tensor]) -> None:
        self._finish = finish

    def wait(self) -> torch.Tensor:
        return self._finish()


class Comm:
    """This rank's communication. Tensors are contiguous; a group of one rank returns at once and counts nothing.

    Args:
        mesh: the process grid; an `axis` below is one of its axes ("tp", "pp", "dp", "world").
        meter: count operations (`tallies`); off, the cost is one test per call.
        timed: also time them; off for fake tensors, where there is no clock to read.
        board: where to write what is being waited for.
    """

    def __init__(self, mesh: Mesh, *, meter: bool = True, timed: bool = True, board: Board | None = None) -> None:
        self.mesh = mesh
        self.rank, self.world_size, self.device = mesh.rank, mesh.world_size, mesh.device
        self.meter, self.timed, self.board = meter, timed, board
        self.phase = ""  # "prefill" or "decode", set by whoever knows
        self.tallies: dict[tuple[str, str, str, str], Tally] = {}
        self.number = 0  # of the last operation begun on this rank
        # gloo moves host memory: where ranks share a GPU, tensors go through the host and back.
        self._staged = mesh.backend == "gloo" and mesh.device.type == "cuda"
        self._on_device = mesh.backend == "nccl"
        self._sending: list[tuple[dist.Work, torch.Tensor]] = []

    # -- collectives ---------------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor, axis: str = "world", what: str = "") -> torch.Tensor:
        """Sum of `x` over the ranks of `axis`, in place and returned; the same bits on every rank."""
        n = self.mesh.size(axis)
        if n == 1:
            return x
        y = self._stage(x)
        wire = 2 * (n - 1) * _bytes(x) // n
        self._do("all_reduce", axis, what, _bytes(x), wire, lambda group: dist.all_reduce(y, group=group))
        return x.copy_(y) if y is not x else x

    def all_gather(self, x: torch.Tensor, axis: str = "world", what: str = "") -> torch.Tensor:
        """`x` of every rank of `axis`, stacked in rank order: shape (n, *x.shape). All shapes must be equal."""
        n = self.mesh.size(axis)
        if n == 1:
            return x.unsqueeze(0)
        y = self._stage(x).contiguous()
        out = torch.empty((n, *y.shape), dtype=y.dtype, device=y.device)

        def gather(group: dist.ProcessGroup | None) -> None:
            _all_gather(out.view(-1), y.view(-1), group=group)

        self._do("all_gather", axis, what, _bytes(x), (n - 1) * _bytes(x), gather)
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
        wire = (n - 1) * _bytes(x) // n
        self._do("reduce_scatter", axis, what, _bytes(x), wire, lambda group: _reduce_scatter(out, y, group=group))
        return out.to(x.device)

    def all_to_all(
        self, x: torch.Tensor, send_rows: list[int], recv_rows: list[int], axis: str = "world", what: str = ""
    ) -> torch.Tensor:
        """Rows of `x`, `send_rows[i]` of them to the i-th rank of `axis`; returns `recv_rows[i]` rows from each, in order."""
        if self.mesh.size(axis) == 1:
            return x
        y = self._stage(x)
        out = torch.empty((sum(recv_rows), *x.shape[1:]), dtype=y.dtype, device=y.device)
        wire = _bytes(x) // max(x.shape[0], 1) * (sum(send_rows) - send_rows[self.mesh.index(axis)])

        def exchange(group: dist.ProcessGroup | None) -> None:
            dist.all_to_all_single(out, y, recv_rows, send_rows, group=group)

        self._do("all_to_all", axis, what, _bytes(x), wire, exchange)
        return out.to(x.device)

    def broadcast(self, x: torch.Tensor, source: int, axis: str = "world", what: str = "") -> torch.Tensor:
        """`x` of the `source`-th rank of `axis`, written into `x` on the others, and returned."""
        return self.broadcast_start(x, source, axis, what).wait()

    def broadcast_start(self, x: torch.Tensor, source: int, axis: str = "world", what: str = "") -> Pending:
        """`broadcast` that goes on while this rank works; its time is that of starting it and of `wait()`."""
        if self.mesh.size(axis) == 1:
            return Pending(lambda: x)
        src = self.mesh.peers(axis)[source]
        y = self._stage(x)

        def start(group: dist.ProcessGroup | None) -> dist.Work:
            beside = self.mesh.group("pp_ids") if axis == "pp" else group
            return dist.broadcast(y, src=src, group=beside, async_op=True)

        work = self._do("broadcast", axis, what, _bytes(x), _bytes(x) if src == self.rank else 0, start)

        def finish() -> torch.Tensor:
            self._do("broadcast", axis, what, 0, 0, lambda group: work.wait(), calls=0)
            return x.copy_(y) if y is not x else x

        return Pending(finish)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank of the world, in rank order (pickled; for reports, not for tensors; not counted)."""
        out: list[Any] = [None] * self.world_size
        self._do(
            "all_gather", "world", "", 0, 0, lambda group: dist.all_gather_object(out, value, group=group), calls=None
        )
        return out

    def barrier(self) -> None:
        """Returns when every rank of the world has arrived."""
        self._do("barrier", "world", "", 0, 0, lambda group: dist.barrier(group=group), calls=None)

    # -- point to point ------------------------------------------------------------------------------------------------

    def send(self, x: torch.Tensor, to: int, axis: str = "world", what: str = "") -> None:
        """Sends `x` to the `to`-th rank of `axis` without waiting for it to be received; `x` must not be changed after."""
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        y = self._stage(x).contiguous()
        dst = self.mesh.peers(axis)[to]
        work = self._do("send", axis, what, _bytes(x), _bytes(x), lambda group: dist.isend(y, dst=dst, group=group))
        self._sending.append((work, y))

    def recv(self, x: torch.Tensor, source: int, axis: str = "world", what: str = "") -> torch.Tensor:
        """Waits for what the `source`-th rank of `axis` sends, writes it into `x` and returns it.

        The time goes to the "send" of the same axis and kind; calls and bytes are the sender's.
        """
        y = self._stage(x)
        src = self.mesh.peers(axis)[source]
        self._do("recv", axis, what, 0, 0, lambda group: dist.recv(y, src=src, group=group), calls=0)
        return x.copy_(y) if y is not x else x

    def flush(self) -> None:
        """Waits until everything sent has left."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    # -- metering ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets what was counted."""
        self.tallies.clear()

    def _stage(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != self.device.type:  # NCCL would fail far from here, a fake process group not at all
            raise ValueError(
                f"a {x.device.type} tensor {tuple(x.shape)} was handed to a rank that works on {self.device}"
            )
        return x.cpu() if self._staged else x

    def _do(
        self, op: str, axis: str, what: str, payload: int, wire: int, call: Callable[[dist.ProcessGroup | None], Any],
        *, calls: int | None = 1,
    ) -> Any:  # fmt: skip
        """Runs `call` on the group of `axis`, numbered, counted and timed.

        calls=0: a wait, of which only the time counts; None: nothing counts.
        """
        self.number += 1
        if self.board is not None:
            self.board.write(self.number, True, _describe(op, axis, what))
        began = time.perf_counter()
        on_device = self._on_device and self.timed and self.meter
        if on_device:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
        try:
            result = call(self.mesh.group(axis))
        except (RuntimeError, ValueError) as error:
            others = [r for r in self.mesh.peers(axis) if r != self.rank]
            raise CommError(
                f"rank {self.rank}: {_describe(op, axis, what)} (its operation {self.number}) failed after "
                f"{time.perf_counter() - began:.1f} s with rank(s) {others}: {str(error).splitlines()[0]}"
            ) from error
        if self.meter and calls is not None:
            tally = self.tallies.setdefault(("send" if op == "recv" else op, axis, self.phase, what), Tally())
            tally.calls += calls
            tally.payload_bytes += payload
            tally.wire_bytes += wire
            if on_device:
                stop.record()
                tally.events.append((start, stop))
            elif self.timed:
                tally.host_seconds += time.perf_counter() - began
        if self.board is not None:
            self.board.write(self.number, False, _describe(op, axis, what))
        return result


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _describe(op: str, axis: str, what: str) -> str:
    return f"{op} of {what} on axis {axis}" if what else f"{op} on axis {axis}"
