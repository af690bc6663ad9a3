"""The same program on several hosts: what to run on each, and hosts emulated on this machine to rehearse it on.

torchrun starts the ranks of a host and joins those of all (its c10d rendezvous); `LLM` then runs in place, on every rank
alike. Slurm and Kubernetes start a torchrun on each node: the files for them are rendered from the templates beside this one.
"""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from labkit.links import Link, Network, enter
from labkit.measure.machine import core_ids

PORT = 29400  # torchrun's own default
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Cluster:
    """Machines to ask for: `nodes` of them, `gpus` and `cpus` on each; a rank for each GPU, or where there are none, each CPU.

    name: the job's. Raises ValueError for what no cluster has.
    """

    nodes: int
    gpus: int = 0
    cpus: int = 0
    name: str = "labkit"

    def __post_init__(self) -> None:
        if self.nodes < 1 or min(self.gpus, self.cpus) < 0 or not self.per_node:
            raise ValueError(
                f"nodes={self.nodes}, gpus={self.gpus}, cpus={self.cpus}: use 1 node or more, and GPUs or CPUs on each"
            )
        if not re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise ValueError(
                f"name={self.name!r}: use up to 40 lower-case letters, digits and -, the first one a letter"
            )

    @property
    def per_node(self) -> int:
        """Ranks on each node."""
        return self.gpus or self.cpus


def torchrun(nodes: int, per_node: int, endpoint: str, name: str = "labkit") -> list[str]:
    """Python's arguments on each of `nodes` hosts, before the program: `per_node` ranks on each, which meet at `endpoint`."""
    return [
        "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={per_node}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}", f"--rdzv-id={name}",
    ]  # fmt: skip


def slurm(command: Sequence[str], cluster: Cluster, *, time: str = "01:00:00", python: str = sys.executable) -> str:
    """A batch file for `sbatch` that runs a command of labkit. time: at most, as Slurm writes it. python: on the nodes."""
    _check(command, cluster)
    words = torchrun(cluster.nodes, cluster.per_node, "$head:$port", "$SLURM_JOB_ID")
    return _render(
        "slurm.sh.j2", cluster, time=time, python=shlex.quote(python), program=shlex.join(["-m", "labkit", *command]),
        torchrun=" ".join(f'"{word}"' if "$" in word else word for word in words),
    )  # fmt: skip


def kubernetes(command: Sequence[str], cluster: Cluster, *, image: str, python: str = "python") -> str:
    """A Service and an indexed Job for `kubectl apply` that run a command of labkit in `image`, which has it installed."""
    _check(command, cluster)
    words = torchrun(cluster.nodes, cluster.per_node, f"{cluster.name}-0.{cluster.name}:{PORT}", cluster.name)
    escaped = [word.replace("$(", "$$(") for word in command]  # Kubernetes puts variables in there
    return _render("kubernetes.yaml.j2", cluster, image=image, command=[python, *words, "-m", "labkit", *escaped])


def _check(command: Sequence[str], cluster: Cluster) -> None:
    """Raises ValueError for a command whose layout needs another number of ranks than there are, before it stands in a queue."""
    given = {"--tp": 1, "--pp": 1, "--dp": 1}
    words = [part for word in command for part in word.split("=", 1)]
    for option, value in pairwise(words):
        if option in given and value.isdigit():
            given[option] = int(value)
    needed, there = prod(given.values()), cluster.nodes * cluster.per_node
    if needed != there:
        layout = " x ".join(f"{option.strip('-')}={value}" for option, value in given.items())
        raise ValueError(
            f"{layout} needs {needed} ranks; {cluster.nodes} x {cluster.per_node} would start: use degrees with product {there}"
        )


def _render(template: str, cluster: Cluster, **values: Any) -> str:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(template).render(**asdict(cluster), per_node=cluster.per_node, **values)


def on_emulated_hosts(program: Sequence[str], *, nodes: int, per_node: int, link: Link | str = "10gbit") -> int:
    """Runs `program` (a script or "-m", a module; and arguments) under torchrun on hosts that are emulated here.

    Each has its own network namespace, address and share of the cores, and sees the others through a `link`; there is no
    memory that ranks of different hosts share. Returns the first exit code that isn't 0; the other hosts are then ended.

    Raises labkit.links.LinkError where the kernel allows no such namespaces, ValueError for what can't be.
    """
    if min(nodes, per_node) < 1:
        raise ValueError(f"nodes={nodes}, per_node={per_node}: use 1 or more")
    rate = (Link.parse(link) if isinstance(link, str) else link).gbit_per_s
    cores, code = core_ids(), 0
    share = max(1, len(cores) // nodes)
    # labkit sets its own threads, but torchrun warns where this isn't said; and of a meeting point that has gone at the end.
    environ = {"OMP_NUM_THREADS": "1", "LOGLEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    hosts: list[subprocess.Popen[bytes]] = []
    with Network(Link(rate, ranks_per_host=per_node), nodes * per_node) as network:
        command = [sys.executable, *torchrun(nodes, per_node, f"{network.address(0)}:{PORT}")]

        def start(node: int) -> subprocess.Popen[bytes]:
            here = [cores[(node * share + i) % len(cores)] for i in range(share)]
            # The machine's name leads to none of these addresses, so torchrun is told them, and who keeps the meeting point.
            own = [f"--local-addr={network.address(node * per_node)}", f"--rdzv-conf=is_host={int(node == 0)}"]

            def inside() -> None:
                enter(*network.where(node * per_node))
                os.sched_setaffinity(0, here)
                ctypes.CDLL(None).prctl(
                    _PR_SET_PDEATHSIG, signal.SIGTERM
                )  # a torchrun that is told to end ends its ranks

            return subprocess.Popen([*command, *own, *program], preexec_fn=inside, env=environ)

        try:
            hosts += [start(node) for node in range(nodes)]
            while not code and any(host.poll() is None for host in hosts):
                time.sleep(0.05)
                code = next((host.returncode for host in hosts if host.poll()), 0)
        finally:
            for host in hosts:
                host.terminate()
            for host in hosts:
                host.wait()
    return code
