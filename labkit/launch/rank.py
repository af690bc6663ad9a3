"""Inside a rank: join the others, run what was asked, report back. Also the way in for a rank that torchrun started.

The launcher (`local`) and a rank share a pipe, a private folder (rendezvous file, board, stacks) and nothing else: no port
is opened but gloo's own, on the loopback interface (or, with an emulated link, inside a private network namespace).
"""

import atexit
import contextlib
import faulthandler
import io
import linecache
import os
import pickle
import platform
import re
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from labkit import shm, symmetric
from labkit.comm import Comm, CommError
from labkit.launch.board import Board
from labkit.links import Link, enter
from labkit.measure.machine import core_ids
from labkit.mesh import Layout, Mesh, gather, pick_backend
from labkit.split import LayoutError

LOST_A_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo")  # gloo's words
OURS = (Path(__file__).parent, Path(__file__).parents[1] / "lab")
Frame = tuple[str, str, str]  # file, line, function


@dataclass(frozen=True)
class Wiring:
    """How ranks are joined, alike on all of them; times in seconds."""

    layout: Layout
    threads: int  # of each rank
    cores: list[int]
    timeout: float  # of an operation
    start_timeout: float
    meter: bool = True
    shared_memory: bool = True
    overlap: bool = False  # operations are to go on while the ranks compute
    pin: bool = True  # each rank to cores of its own
    head: str = ""  # the address of rank 0's host, where ranks are on several
    link: Link | None = None  # emulated
    namespaces: list[tuple[str, str]] | None = None  # by the kernel, in these, a pair for each rank; None: by Comm


@dataclass(frozen=True)
class Job:
    """What the launcher tells every rank of a run."""

    work: bytes  # (fn, args), pickled by value
    wiring: Wiring
    folder: Path
    environ: dict[str, str]  # empty: the rank's own
    sources: dict[str, Any]  # of notebook cells, as linecache keeps them


@dataclass(frozen=True)
class Failure:
    """How a rank failed. `own` is False if all that is known is that it lost, or waited in vain for, another rank."""

    how: str  # "raised", "killed", "exited"
    text: str  # goes on from "rank 3"
    own: bool
    kind: str = ""  # the exception's class
    trace: str = ""
    frames: tuple[Frame, ...] = ()  # the innermost first


class Channel:
    """A rank's line to the launcher."""

    def __init__(self, link: Connection, board: Board) -> None:
        self._link, self._board = link, board
        self._lock = threading.Lock()
        self._over = False

    def receive(self) -> Any:
        """The next message from the launcher. Raises EOFError when it wants this rank to end."""
        self._board.write(0, True, "its channel, for a message from the launcher")
        raw = b"" if self._over else self._link.recv_bytes()
        if not raw:
            self._over = True
            raise EOFError("the launcher has closed this group of ranks")
        self._board.write(0, False, "")
        return pickle.loads(raw)

    def waiting(self) -> bool:
        """Whether there is a message to receive."""
        return self._over or self._link.poll()

    def send(self, message: Any) -> None:
        """Sends `message`, tensors as copies. Raises TypeError if it cannot be pickled."""
        self.put("message", message)

    def put(self, kind: str, value: Any) -> None:
        try:
            raw = cloudpickle.dumps((kind, value))
        except Exception as error:  # whatever a __reduce__ raises
            raise TypeError(f"a value of type {type(value).__name__} cannot be sent to the launcher: {error}") from None
        with self._lock:
            self._link.send_bytes(raw)

    def wait_for_the_end(self) -> None:
        while not self._over:
            self._over = not self._link.recv_bytes()


class _Lines(io.TextIOBase):
    """A stdout or stderr that sends whole lines to the launcher."""

    encoding = "utf-8"

    def __init__(self, channel: Channel, stream: str) -> None:
        self._channel, self._stream = channel, stream
        self._lock = threading.Lock()
        self._rest = ""

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            if lines:
                self._channel.put(self._stream, lines)
        return len(text)

    def finish(self) -> None:
        self.write("\n" if self._rest else "")


def main(rank: int, job: Job, links: list[Connection]) -> None:
    """The whole life of one launched rank."""
    if job.wiring.namespaces:
        enter(*job.wiring.namespaces[rank])  # first of all: a second thread would bar the way
    end_with_launcher(links[rank], job.folder)
    for other in links[:rank] + links[rank + 1 :]:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the launcher's to answer
    try:
        world = len(links)
        work(rank, world, job, links[rank], lambda: dist.FileStore(str(job.folder / "rendezvous"), world), rank, world)
    except (OSError, EOFError):  # the launcher has gone, and with it the pipe and the folder
        os._exit(1)
    os._exit(0)  # not through the destructors of Python, gloo and NCCL: where a peer has gone they wait, or abort


def work(
    rank: int, world: int, job: Job, link: Connection, meet: Callable[[], dist.Store], local_rank: int, local_world: int,
    beside: Callable[[Channel, Board], None] | None = None,
) -> None:  # fmt: skip
    """Joins the others, in the store of `meet()`; does the job; tells the launcher how it went, and waits until all have.

    beside: runs in a thread of its own meanwhile.
    """
    stack = (job.folder / f"stack-{rank}").open("w")
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    linecache.cache.update(job.sources)
    if job.environ:
        os.environ.clear()
        os.environ.update(job.environ)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(local_rank)})
    os.environ.update({"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local_world)})
    board = Board(job.folder / "board", world, rank)
    channel = Channel(link, board)
    if beside:
        threading.Thread(target=beside, args=(channel, board), daemon=True).start()
    sys.stdout, sys.stderr = out, err = _Lines(channel, "stdout"), _Lines(channel, "stderr")
    try:
        group = {"store": meet(), "rank": rank, "world_size": world}
        comm = _join(job.wiring, group, board)
        fn, args = pickle.loads(job.work)
        channel.put("ready", None)
        fn(comm, channel, *args)
        comm.flush()
        end: tuple[str, Failure | None] = ("done", None)
    except BaseException as error:
        end = ("failed", _failure(error))
    out.finish()
    err.finish()
    channel.put(*end)
    # Connections stay open until the launcher has heard from all: who waits for this rank shall be seen waiting.
    channel.wait_for_the_end()


def end_with_launcher(link: Connection, folder: Path) -> None:
    """From now on, ends this process when the launcher's end of the line closes, which it does however the launcher dies.

    Works while the main thread is blocked in a collective, which does not hold the GIL.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(
            link.fileno(), getattr(select, "POLLRDHUP", 0)
        )  # no events but the hang-up, of a pipe or over TCP
        poll.poll()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _failure(error: BaseException) -> Failure:
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    lost = any(
        isinstance(cause, CommError | dist.DistError)
        or (isinstance(cause, RuntimeError) and any(words in str(cause) for words in LOST_A_PEER))
        for cause in causes
    )
    frames = error.__traceback__  # from the function that was handed in: what is above it is ours
    while frames and Path(frames.tb_frame.f_code.co_filename).parent in OURS:
        frames = frames.tb_next
    said = re.sub(r"\[/\S+\.cc:\d+\] ", "", str(error)).split(" This is typically")[0].strip()
    kind = type(error).__name__
    text = f" raised {kind}: {said.splitlines()[0] if said else ''}".removesuffix(": ")
    if isinstance(error, CommError):
        text = ": " + said.split(": ", 1)[-1]
    trace = traceback.format_exception(type(error), error, frames, chain=not isinstance(error, CommError))
    where = [(frame.filename, str(frame.lineno), frame.name) for frame in reversed(traceback.extract_tb(frames))]
    return Failure("raised", text, not lost, kind, "".join(trace) if frames else "", tuple(where))


# -- joining the others --------------------------------------------------------------------------------------------------


def join_torchrun(
    layout: Layout, *, threads: int | None = None, collective_timeout: float = 10.0, meter: bool = True,
    shared_memory: bool = True, overlap: bool = False,
) -> Comm:  # fmt: skip
    """Joins the ranks that torchrun has started, in place. The first call makes the process group, later ones use it.

    Args:
        layout: the grid. threads: torch threads of this rank (default: the host's cores over its ranks).
        collective_timeout: seconds that an operation between ranks may wait. meter: count operations.
        shared_memory: use it between ranks of one host. overlap: operations are to go on while the ranks compute.

    Raises LayoutError when the number of ranks is not the layout's.
    """
    world = int(os.environ["WORLD_SIZE"])
    if world != layout.world:
        grid = f"tp={layout.tp} x pp={layout.pp} x dp={layout.dp}"
        raise LayoutError(f"torchrun started {world} ranks; {grid} needs {layout.world}")
    cores = core_ids()
    threads = threads or max(1, len(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    head = os.environ["MASTER_ADDR"]
    wiring = Wiring(layout, threads, cores, collective_timeout, 60, meter, shared_memory, overlap, head=head)
    return _join(wiring, {"init_method": "env://"}, None)


def _join(wiring: Wiring, group: dict[str, Any], board: Board | None) -> Comm:
    layout, cores = wiring.layout, wiring.cores
    here = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", layout.world))
    backend, kind = pick_backend(ranks_here)
    device = torch.device(kind, here % torch.cuda.device_count()) if kind == "cuda" else torch.device("cpu")
    if not dist.is_initialized():
        torch.set_num_threads(wiring.threads)
        if wiring.pin and ranks_here * wiring.threads <= len(cores) and hasattr(os, "sched_setaffinity"):
            share = len(cores) // ranks_here
            os.sched_setaffinity(0, cores[here * share : (here + 1) * share])
        if wiring.namespaces:
            os.environ["GLOO_SOCKET_IFNAME"] = "eth0"  # there is no other
        elif "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface(wiring.head, ranks_here == layout.world)):
            os.environ["GLOO_SOCKET_IFNAME"] = name  # else gloo uses what the host's name resolves to
        if kind == "cuda":
            torch.cuda.set_device(device)
        group["device_id"] = device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=wiring.start_timeout), **group)
        if board is None:  # torchrun's ranks end like any script, and gloo's threads abort one that leaves them running
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    _set_pg_timeout(timedelta(seconds=wiring.timeout))  # starting up may take longer than a collective
    link = None if wiring.namespaces else wiring.link
    host = f"{host_name()} {here // link.ranks_per_host}" if link else host_name()
    mesh = Mesh(layout, device, wiring.timeout, gather(host), ranks_here)
    if not wiring.overlap:
        _calm_gloo()
    shared: dict[str, Any] = {}
    if wiring.shared_memory and backend == "nccl":
        shared = symmetric.join(mesh)
    elif wiring.shared_memory and kind == "cpu":
        shared = shm.join(mesh, wiring.timeout, alone=ranks_here <= len(cores))
    return Comm(mesh, meter=wiring.meter, board=board, shared=shared, link=link)


def interface(head: str, alone: bool) -> str | None:
    """The network interface for gloo: with all ranks on this host (`alone`) the loopback, else the one that leads to `head`,
    the first rank's host, or on that host into the world. None where this can't be told."""
    if alone:
        return "lo" if Path("/sys/class/net/lo").exists() else None
    names = {a.address: name for name, addresses in psutil.net_if_addrs().items() for a in addresses}
    for target in (head, "203.0.113.1"):  # which is nobody's (RFC 5737); nothing is sent to either
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            address = probe.getsockname()[0]
            if address in names and not address.startswith("127."):
                return names[address]
    return None


def host_name() -> str:
    """Names this host, or what an emulated link has made one of: a machine since its start, and a network namespace of it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/net")
    return platform.node()


def _calm_gloo() -> None:
    """Gives gloo's I/O threads the lowest weight on the core that they share with this rank's work.

    Such a thread spins while another thread of its rank holds the socket it wants to read (handleEvents in gloo's
    transport/tcp/pair.cc tries the lock and returns to epoll). If the holder has been preempted, both wait for the
    scheduler's next tick, 4 ms away. Two ranks pinned to two cores, all-reduce of 2.3 KB: 2.6 ms before, 0.5 ms after.

    Operations that are to go on beside a rank's work need their share of its core, so then nothing is changed: TP=2 prefill
    over 500 Mbit/s, overlapped, took 8.2 s with the lowest weight and 7.3 s with the usual one.
    """
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text() == "gloo_tcp_loop\n":
                os.setpriority(os.PRIO_PROCESS, int(task.name), 19)
