"""The same program on several hosts: what to run on each, and hosts emulated on this machine to rehearse it on.

torchrun starts the ranks of a host and joins those of all (its c10d rendezvous); `LLM` then runs in place, on every rank
alike. Nothing here knows what the program does.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from labkit.links import Link, Network, enter
from labkit.measure.machine import core_ids

PORT = 29400  # torchrun's own default
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def torchrun(nodes: int, per_node: int, head: str, name: str = "labkit") -> list[str]:
    """What to run on each of `nodes` hosts, before the program: `per_node` ranks on each, which meet at host `head`."""
    return [
        "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={per_node}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={head}:{PORT}", f"--rdzv-id={name}",
    ]  # fmt: skip


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
        command = [sys.executable, *torchrun(nodes, per_node, network.address(0))]

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
