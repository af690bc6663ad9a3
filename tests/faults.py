"""Faults that strike one rank of a real engine, once, at a named moment. Nothing is imitated: ranks do die, stop, disagree."""

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from labkit.comm import Comm
from labkit.engine import core
from labkit.model.checkpoint import Piece, Weights
from labkit.model.find import Model

Fault = Callable[[Comm | None], Any]  # None: while it loads, there is no Comm at hand


def killed(comm: Comm | None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(comm: Comm | None) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def silent(comm: Comm | None) -> None:
    time.sleep(1000)


def raising(comm: Comm | None) -> None:
    raise ZeroDivisionError("the one cause")


def leaving(comm: Comm | None) -> None:
    os._exit(3)


def crashing(comm: Comm | None) -> None:
    ctypes.string_at(0)


def out_of_memory(comm: Comm | None) -> None:
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, -1))
    torch.ones(2**30)


def disagreeing(comm: Comm | None) -> None:
    """Enters a collective that no other rank comes to, or that meets another one."""
    assert comm
    axis = next(axis for axis in ("tp", "pp", "dp") if comm.mesh.size(axis) > 1)
    comm.all_gather(torch.zeros(5), axis, "another")


def off_the_network(comm: Comm | None) -> None:
    """Pulls the plug of this rank's emulated host."""
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)


@dataclass(frozen=True)
class Faulty(Model):
    """A model that is fine, but for `fault`. It strikes `rank` once: while it loads (`when` "load"), or in its third step of
    "prefill" or "decode". `mark`: a file that tells that it has; with `always`, a folder of files that tell of each time.
    """

    fault: Fault
    rank: int
    when: str
    mark: Path
    always: bool = False

    def weights(self, seed: int) -> Weights:
        weights = super().weights(seed)
        if dist.get_rank() != self.rank or (self.mark.exists() and not self.always):
            return weights
        if self.when == "load":
            return _Trap(weights, self.strike)
        forward, steps = core.Engine._forward, []

        def trap(engine: core.Engine, plan: core.Plan, *hidden: Any) -> Any:
            if engine.replica in plan:
                steps.append("prefill" if plan[engine.replica].prefill else "decode")
            if steps.count(self.when) == 3:
                self.strike(engine.comm)
            return forward(engine, plan, *hidden)

        core.Engine._forward = trap  # type: ignore[method-assign]
        return weights

    def strike(self, comm: Comm | None) -> None:
        if self.always:
            (self.mark / str(os.getpid())).touch()
        elif self.mark.exists():
            return
        else:
            self.mark.touch()
        self.fault(comm)


class _Trap:
    """Weights that are read as far as the tenth piece."""

    bytes_read = 0

    def __init__(self, weights: Weights, strike: Fault) -> None:
        self.weights, self.strike, self.left = weights, strike, 10

    def read(self, piece: Piece) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            self.strike(None)
        return self.weights.read(piece)
