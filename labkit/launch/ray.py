"""Ranks on the nodes of a Ray cluster, from a notebook or script: each is an actor, watched and ended as local ranks are.

Ranks that are neighbours (a tensor-parallel group, unless the layout's order says otherwise) are packed on one node, and
groups are spread over nodes. Ray places the actors and says why one has died; everything else, messages, output, what each
rank is doing, goes over one TCP connection of each rank to the launcher, which knows by its end that the rank has ended.
Every node needs labkit's dependencies; labkit itself travels with `ray.init` where this is left to the launcher.
"""

import contextlib
import os
import secrets
import shutil
import socket
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import cloudpickle
import ray
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import labkit
from labkit.launch.board import Board
from labkit.launch.local import GRACE, RankError, RankGroup
from labkit.launch.rank import Channel, Failure, Frame, Job, end_with_launcher, host_name, work
from labkit.mesh import Layout

BEAT = 0.25  # seconds between two looks at what a rank is doing
PATIENCE = 5.0  # seconds for Ray to say how an actor has ended, or to end one


class RayGroup(RankGroup):
    """A `RankGroup` whose ranks are actors on a Ray cluster: the one that `ray.init` has joined, or RAY_ADDRESS, or this node's.

    A rank takes `threads` (default 1) of Ray's CPUs, and a GPU where the cluster has enough; it isn't pinned to cores, which
    other jobs may share. Raises RankError also where the cluster has no room, or a node no labkit.
    """

    def __init__(self, fn: Callable[..., Any], ranks: int, **options: Any) -> None:
        if options.get("link"):
            raise ValueError(f"link={str(options['link'])!r} on Ray: links are emulated between local CPU ranks only")
        with _by_value(fn, *options.get("args", ())):
            super().__init__(fn, ranks, **options)

    def _threads(self) -> int:
        return 1

    def _ending(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        self._actors: list[Any] = []
        self._working: list[Any] = []
        self._groups: list[PlacementGroup] = []
        return _end, (self._links, self._actors, self._working, self._groups, self._files, self._folder)

    def _start(self, job: Job) -> None:
        self.pids: list[int] = []  # none on this machine
        self._frames: dict[int, tuple[Frame, ...]] = {}
        self._boards = [Board(self._folder / "board", self.ranks, rank) for rank in range(self.ranks)]
        self._files += self._boards
        if not ray.is_initialized():
            ray.init(os.environ.get("RAY_ADDRESS", "auto"), runtime_env={"py_modules": [labkit]})
        wiring = job.wiring
        gpus = ray.cluster_resources().get("GPU", 0) >= self.ranks
        each = {"CPU": float(wiring.threads)} | ({"GPU": 1.0} if gpus else {})
        group, bundle_of = _place(wiring.layout, each, wiring.start_timeout)
        self._groups.append(group)
        kind: Any = ray.remote(_Actor)
        for rank in range(self.ranks):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle_of[rank])
            self._actors.append(
                kind.options(num_cpus=each["CPU"], num_gpus=int(gpus), scheduling_strategy=strategy).remote()
            )
        try:
            places = ray.get([actor.place.remote() for actor in self._actors], timeout=wiring.start_timeout)
            head, port = ray.get(self._actors[0].open_store.remote(self.ranks), timeout=wiring.start_timeout)
        except RayError as error:
            raise RankError(f"Ray could not start the ranks: {error}", how="exited") from error
        hosts = [host for host, _ in places]
        job = replace(job, environ={}, wiring=replace(wiring, pin=False, head=head))
        key = secrets.token_bytes(32)
        with socket.create_server((ray.util.get_node_ip_address(), 0), backlog=self.ranks) as server:
            address = server.getsockname()
            for rank, actor in enumerate(self._actors):
                here = [peer for peer in range(self.ranks) if hosts[peer] == hosts[rank]]
                visible = [gpu for peer in here for gpu in places[peer][1]]
                local = here.index(rank), len(here)
                self._working.append(
                    actor.work.remote(rank, self.ranks, job, address, key, (head, port), local, visible)
                )
            self._meet(server, key, wiring.start_timeout)

    def _meet(self, server: socket.socket, key: bytes, patience: float) -> None:
        """Takes in the connections of all ranks, which know `key`."""
        server.settimeout(BEAT)
        deadline = time.monotonic() + patience
        while len(self._links) < self.ranks:
            failed, _ = ray.wait(self._working, timeout=0)
            for ref in failed:  # before it has dialled in
                rank = self._working.index(ref)
                if rank not in self._links:
                    raise RankError(f"rank {rank} of {self.ranks}{self._ended(rank).text}", rank, "exited")
            if time.monotonic() > deadline:
                late = sorted(set(range(self.ranks)) - self._links.keys())
                raise RankError(f"ranks {late} have not connected after {patience:g} s", how="timeout")
            with contextlib.suppress(TimeoutError):
                link = _connection(server.accept()[0])
                deliver_challenge(link, key)
                answer_challenge(link, key)
                self._links[link.recv()] = link

    def _take(self, rank: int, kind: str, value: Any) -> None:
        if kind == "doing":
            doing, self._frames[rank] = value
            if doing:
                self._boards[rank].write(*doing)
        else:
            super()._take(rank, kind, value)

    def _ended(self, rank: int) -> Failure:
        """How an actor ended, in Ray's words."""
        try:
            ray.get(self._working[rank], timeout=PATIENCE)
            said = "it returned"
        except RayError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            said = next((line for line in lines if "cause" in line or "error" in line.lower()), lines[0])
        return Failure("killed", f" died on its Ray node ({said})", True)

    def _ask_for_stacks(self, ranks: set[int]) -> None:
        """They come by themselves."""

    def _stack(self, rank: int, patience: float = 0) -> tuple[Frame, ...]:
        return self._frames.get(rank, ())


class _Actor:
    """One rank, on a node."""

    def place(self) -> tuple[str, list[str]]:
        """The host, and the GPUs that Ray has given this rank."""
        return host_name(), [str(gpu) for gpu in ray.get_gpu_ids()]

    def open_store(self, world: int) -> tuple[str, int]:
        """Where the ranks are to meet: a store that this one keeps, at a free port."""
        address = ray.util.get_node_ip_address()
        self.store = dist.TCPStore(address, 0, world, is_master=True, wait_for_workers=False)
        return address, self.store.port

    def work(
        self, rank: int, world: int, job: Job, launcher: tuple[str, int], key: bytes, meeting: tuple[str, int],
        local: tuple[int, int], gpus: list[str],
    ) -> None:  # fmt: skip
        """The whole life of a rank."""
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
                gpus
            )  # all of this host's ranks: each takes that of its number
        link = _connection(socket.create_connection(launcher, timeout=job.wiring.start_timeout))
        answer_challenge(link, key)
        deliver_challenge(link, key)
        link.send(rank)
        job = replace(job, folder=Path(tempfile.mkdtemp(prefix="labkit-")))
        end_with_launcher(link, job.folder)

        def meet() -> dist.Store:
            patience = timedelta(seconds=job.wiring.start_timeout)
            return self.store if rank == 0 else dist.TCPStore(*meeting, world, is_master=False, timeout=patience)

        work(rank, world, job, link, meet, *local, beside=partial(_tell, rank, job.folder))


def _tell(rank: int, folder: Path, channel: Channel, board: Board) -> None:
    """Tells the launcher, which can't look, what this rank is doing: what it has written on its board, and its stack."""
    shutil.rmtree(folder, ignore_errors=True)  # the files in it are open, and nobody else's
    told: Any = None
    while True:
        time.sleep(BEAT)
        doing = board.read()[rank]
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        frames = tuple((f.filename, str(f.lineno), f.name) for f in reversed(traceback.extract_stack(frame)))
        said = doing.number, doing.waiting, doing.text
        if (said, frames) != told:
            try:
                channel.put("doing", (said if told is None or said != told[0] else None, frames))
            except OSError:  # the launcher has gone
                return
        told = said, frames


@contextlib.contextmanager
def _by_value(*values: Any) -> Iterator[None]:
    """Lets functions travel by value, also from modules of the caller's own, which nodes don't have."""
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    modules = {sys.modules.get(getattr(value, "__module__", None) or "") for value in values if callable(value)}
    own = [
        module for module in modules
        if module and module.__name__.split(".")[0] not in ("labkit", "__main__")
        and not (getattr(module, "__file__", None) or installed[0]).startswith(installed)
    ]  # fmt: skip
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)


def _place(layout: Layout, each: dict[str, float], patience: float) -> tuple[PlacementGroup, list[int]]:
    """Room for ranks that take `each`, neighbours on one node and groups of them on different nodes where there are; and
    which bundle of it is each rank's. Where no node has room for a group, its ranks go where they can."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    axis = layout.order.split("-")[-1]
    groups = sorted({tuple(layout.peers(rank, axis)) for rank in range(layout.world)})
    size = len(groups[0])
    together = any(all(node.get(name, 0) >= size * amount for name, amount in each.items()) for node in nodes)
    if not together:
        groups, size = [(rank,) for rank in range(layout.world)], 1
    bundle = {name: size * amount for name, amount in each.items()}
    group = placement_group([bundle] * len(groups), strategy="SPREAD" if together else "PACK")
    if not ray.wait([group.ready()], timeout=patience)[0]:
        remove_placement_group(group)
        free = {name: ray.available_resources().get(name, 0.0) for name in each}
        raise RankError(
            f"Ray has no room for {len(groups)} x {bundle} on {len(nodes)} nodes within {patience:g} s: free are {free}, on "
            "all nodes together",
            how="timeout",
        )
    return group, [next(i for i, ranks in enumerate(groups) if rank in ranks) for rank in range(layout.world)]


def _connection(line: socket.socket) -> Connection:
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages are short, and each is awaited
    return Connection(line.detach())


def _end(
    links: dict[int, Connection], actors: list[Any], working: list[Any], groups: list[PlacementGroup], files: list[Any],
    folder: Path,
) -> None:  # fmt: skip
    """Ends the actors, whatever they are doing, and waits until their lines say that they have."""
    for link in links.values():
        with contextlib.suppress(OSError):
            link.send_bytes(b"")
    with contextlib.suppress(Exception):  # Ray itself may have gone
        if working:
            ray.wait(working, num_returns=len(working), timeout=GRACE)
        for actor in actors:
            ray.kill(actor)
        for group in groups:
            remove_placement_group(group)
    deadline = time.monotonic() + PATIENCE
    for link in links.values():
        with contextlib.suppress(OSError, EOFError):
            while link.poll(max(0.0, deadline - time.monotonic())):
                link.recv_bytes()
        link.close()
    for file in files:
        file.close()
    shutil.rmtree(folder, ignore_errors=True)
