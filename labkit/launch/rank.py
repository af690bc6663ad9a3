"""Inside one rank: join the others, run what was asked, report back. Also the way in under torchrun."""

import contextlib
import faulthandler
import io
import os
import pickle
import shutil
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from labkit.comm import Comm, CommError
from labkit.launch.board import Board
from labkit.measure.machine import usable_cores
from labkit.mesh import Layout, Mesh, pick_backend

OURS = [str(Path(__file__).with_name(name)) for name in ("rank.py", "local.py")] + [
    str(Path(__file__).parents[1] / "lab" / "magics.py")
]


@dataclass(frozen=True)
class Job:
    """What every rank of a run is told. `work` is (fn, args), pickled by value; files live in `folder`."""

    work: bytes
    layout: Layout
    threads: int
    folder: Path
    collective_timeout: float
    meter: bool


class Channel:
    """A rank's line to the launcher."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def receive(self) -> Any:
        """The next message; EOFError when the launcher has closed."""
        return pickle.loads(self._connection.recv_bytes())

    def send(self, message: Any) -> None:
        self.put("message", message)

    def put_result(self, kind: str, value: Any) -> None:
        """`put`, or, if the value can't be sent, what is wrong with it."""
        try:
            self.put(kind, value)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            reason = (
                f"{type(error).__name__}: the result, a {type(value).__name__}, can't be sent to the launcher: {error}"
            )
            self.put("failed", ("", reason, False))

    def wait_for_end(self) -> None:
        """Returns when the launcher has closed."""
        with contextlib.suppress(EOFError):
            while True:
                self._connection.recv_bytes()

    def put(self, kind: str, value: Any) -> None:
        raw = cloudpickle.dumps((kind, value))
        with self._lock:
            self._connection.send_bytes(raw)


class _Lines(io.TextIOBase):
    """A stdout or stderr that goes to the launcher, line by line."""

    def __init__(self, channel: Channel, stream: str) -> None:
        self._channel, self._stream, self._rest = channel, stream, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._channel.put("output", (self._stream, lines))
        return len(text)

    def close_line(self) -> None:
        if self._rest:
            self.write("\n")


def main(rank: int, job: Job, connections: list[Connection]) -> None:
    """The whole life of one launched rank."""
    threading.Thread(target=_end_with_launcher, args=(job.folder,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides what ends
    stacks = (job.folder / f"stack-{rank}").open("w")  # for the life of the process
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    channel = Channel(connections[rank])
    sys.stdout, sys.stderr = out, err = _Lines(channel, "stdout"), _Lines(channel, "stderr")
    try:
        store = dist.FileStore(str(job.folder / "rendezvous"), job.layout.world)
        board = Board(job.folder / "board", rank)
        comm = join(
            rank, rank, job.layout.world, job.layout, store, job.threads, job.collective_timeout, job.meter, board
        )
        fn, args = pickle.loads(job.work)
        result = fn(comm, channel, *args)
        comm.flush()
        said = ("result", result)
    except BaseException as error:
        said = ("failed", (_traceback(error), f"{type(error).__name__}: {error}", isinstance(error, CommError)))
    out.close_line()
    err.close_line()
    with contextlib.suppress(OSError):  # the launcher may have gone
        channel.put_result(*said)
        # Stay until the launcher hangs up: a rank that leaves early breaks connections which its peers still need.
        channel.wait_for_end()
    # Not by way of Python's and gloo's destructors: they would wait for peers that are no more.
    os._exit(0)


def join(
    rank: int, local_rank: int, local_ranks: int, layout: Layout, store: dist.Store | None, threads: int,
    collective_timeout: float, meter: bool, board: Board | None,
) -> Comm:  # fmt: skip
    """Joins the process group (through `store`, or torchrun's environment) and gives this rank's Comm."""
    torch.set_num_threads(threads)
    backend, kind = pick_backend(local_ranks)
    device = torch.device(kind, local_rank % torch.cuda.device_count()) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if local_ranks == layout.world and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing of a local run listens on a network
    limit = timedelta(seconds=collective_timeout)
    if store is None:
        dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(backend, store=store, rank=rank, world_size=layout.world, timeout=limit)
    mesh = Mesh(layout, device, timeout=collective_timeout)
    # Not before: gloo's own threads would inherit the core and fight the rank for it (all-reduce of 2 KB on two cores, mean
    # of 300 between matrix products: 0.8 ms this way, 1.4 ms unpinned, 1.9 ms pinned first).
    pin(local_rank, local_ranks)
    return Comm(mesh, meter=meter, board=board)


def pin(local_rank: int, local_ranks: int) -> None:
    """Gives this rank cores of its own, if there are enough for all."""
    if local_ranks > usable_cores() or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_ranks
    os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])


def _end_with_launcher(folder: Path) -> None:
    launcher = parent_process()
    if launcher is not None:
        launcher.join()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _traceback(error: BaseException) -> str:
    """The traceback from the caller's function on: the frames that led to it are the same for every run."""
    frames = error.__traceback__
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename in OURS:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))
