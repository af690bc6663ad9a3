"""Slow links between local CPU ranks, held to their rate by the kernel, without root.

A `Network` is one user namespace with a network namespace for each imitated host, joined by a bridge; `tc tbf` limits what
each host sends, and what the bridge sends to it, as a cable to a switch would (user_namespaces(7), tc-tbf(8)). It is nothing
but open files of the launcher: when the launcher and the ranks have ended, however they did, the kernel removes it all.
It knows nothing of gloo or torch: this file also runs as a script of the standard library, which makes the namespaces.
"""

import ctypes
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labkit.comm import Comm

FORMS = "1gbit, 200mbit, 1gbit,50us or 1gbit,2ranks/host"
SLOWEST, FASTEST = 1e-3, 100.0  # Gbit/s: slower, a segment takes longer than TCP waits; faster, no CPU keeps up
HOSTS = 64
ADDRESS = "10.77.0.{}"  # of hosts 1, 2, ... in a network of their own
TIMEOUT = 20.0  # seconds that setting up may take; it needs 0.1 s for two hosts, 3 s for 64
_NEWUSER, _NEWNET = 0x10000000, 0x40000000  # linux/sched.h


class LinkError(RuntimeError):
    """This kernel, or what is installed here, does not let this user emulate a link: which step failed, and what it said."""


@dataclass(frozen=True)
class Link:
    """A link of each host, in each direction.

    Args:
        gbit_per_s: rate, 1e9 bits per second, headers included. latency_us: microseconds that every message takes besides.
        ranks_per_host: so many successive ranks share one, and are not slowed down among themselves.

    Raises ValueError for what cannot be.
    """

    gbit_per_s: float
    latency_us: float = 0.0
    ranks_per_host: int = 1

    def __post_init__(self) -> None:
        if not SLOWEST <= self.gbit_per_s <= FASTEST:
            raise ValueError(f"a link of {self.gbit_per_s:g} Gbit/s: use {SLOWEST:g} (1mbit) to {FASTEST:g} (100gbit)")
        if not 0 <= self.latency_us <= 1e6:
            raise ValueError(f"a latency of {self.latency_us:g} us: use 0 to 1000000")
        if not isinstance(self.ranks_per_host, int) or self.ranks_per_host < 1:
            raise ValueError(f"ranks_per_host={self.ranks_per_host!r}: use a whole number, 1 or more")

    @classmethod
    def parse(cls, text: str) -> "Link":
        """The link that `str` writes so, as "200mbit" or "1gbit,50us,2ranks/host". Raises ValueError for anything else."""
        number = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
        found = re.fullmatch(rf"{number}([mg])bit(?:,{number}us)?(?:,(\d+)ranks?/host)?", text.lower().replace(" ", ""))
        if not found:
            raise ValueError(f"link {text!r}: write it as {FORMS}")
        rate, unit, latency, ranks = found.groups()
        return cls(float(rate) / (1000 if unit == "m" else 1), float(latency or 0), int(ranks or 1))

    def __str__(self) -> str:
        mbit = f"{self.gbit_per_s * 1000:.12g}"
        in_mbit = self.gbit_per_s < 1 and float(mbit) / 1000 == self.gbit_per_s
        text = f"{mbit}mbit" if in_mbit else f"{self.gbit_per_s!r}".removesuffix(".0") + "gbit"
        text += f",{self.latency_us!r}".removesuffix(".0") + "us" if self.latency_us else ""
        return text + (f",{self.ranks_per_host}ranks/host" if self.ranks_per_host > 1 else "")

    @property
    def label(self) -> str:
        """For figures and tables, as "1 Gbit/s"."""
        text = f"{self.gbit_per_s:g} Gbit/s" if self.gbit_per_s >= 1 else f"{self.gbit_per_s * 1000:g} Mbit/s"
        text += f" + {self.latency_us:g} us" if self.latency_us else ""
        return text + (f", {self.ranks_per_host} ranks per host" if self.ranks_per_host > 1 else "")

    def seconds(self, wire_bytes: float) -> float:
        """What one message of so many bytes takes."""
        return self.latency_us * 1e-6 + wire_bytes * 8 / (self.gbit_per_s * 1e9)


class Network:
    """Hosts for `ranks` ranks, each with one `link`. Raises LinkError if they cannot be made, ValueError for too many.

    `where(rank)` tells a rank what to `enter`. Close it, use it as a context manager, or drop it; ranks inside keep theirs.
    """

    def __init__(self, link: Link, ranks: int) -> None:
        hosts = -(-ranks // link.ranks_per_host)
        if hosts > HOSTS:
            raise ValueError(f"{ranks} ranks, {link.ranks_per_host} per host: use at most {HOSTS} hosts")
        self.link, self._fds = link, _make(link, hosts)
        self._close = weakref.finalize(self, _close_all, self._fds)

    def where(self, rank: int) -> tuple[str, str]:
        """Paths of the user namespace and of this rank's network namespace, good while this network is open."""
        user, _bridge, *hosts = self._fds
        return f"/proc/{os.getpid()}/fd/{user}", f"/proc/{os.getpid()}/fd/{hosts[rank // self.link.ranks_per_host]}"

    def address(self, rank: int) -> str:
        """The address of this rank's host."""
        return ADDRESS.format(rank // self.link.ranks_per_host + 1)

    def close(self) -> None:
        """Lets go of the namespaces."""
        self._close()

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def enter(user_ns: str, net_ns: str) -> None:
    """Moves this process, which must have no second thread yet, into a `Network`, for good; raises LinkError.

    There its user is shown as root, but owns the same files. The only network interfaces are `lo` and `eth0`.
    """
    with open(user_ns) as user, open(net_ns) as net:  # both now: from inside, the launcher may not be looked into
        _libc("setns", user.fileno(), _NEWUSER)
        _libc("setns", net.fileno(), _NEWNET)


def measured_gbit(comm: "Comm", megabytes: float = 16, repeats: int = 5) -> float:
    """Rate that an all-reduce over all ranks reaches, in Gbit/s: bytes that one rank sends, over the median time.

    Args:
        megabytes: what each rank hands in, in MiB. Every rank calls this; it is not counted. Headers take some 5 % of a link.
    """
    import torch

    x = torch.zeros(int(megabytes * 2**20) // 4)
    meter, comm.meter = comm.meter, False
    took = []
    for _ in range(repeats + 1):  # the first one finds TCP still slow
        comm.barrier()
        began = time.perf_counter()
        comm.all_reduce(x)
        took.append(time.perf_counter() - began)
    comm.meter = meter
    return 2 * (comm.world_size - 1) / comm.world_size * x.nbytes * 8 / 1e9 / statistics.median(took[1:])


# -- making the namespaces -----------------------------------------------------------------------------------------------


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _make(link: Link, hosts: int) -> list[int]:
    """File descriptors of the user namespace, of the bridge's network namespace, and of each host's."""
    if sys.platform != "linux":
        raise LinkError(f"network namespaces are Linux's; this is {sys.platform}")
    if link.latency_us:
        raise LinkError("tbf limits a rate and adds no latency")
    here, there = socket.socketpair()
    with here, there:
        # In a process of its own, because making a user namespace takes one without a second thread.
        command = [sys.executable, "-I", "-S", __file__, str(there.fileno()), str(hosts), str(link)]
        try:
            done = subprocess.run(
                command, pass_fds=[there.fileno()], capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise LinkError(f"network namespaces were not made within {TIMEOUT:g} s") from None
        if done.returncode:
            raise LinkError(" ".join(done.stderr.split()))
        files = socket.recv_fds(here, 16, hosts + 2)[1]
    for file in files:
        os.set_inheritable(file, False)  # as all of Python's files are but those received
    return files


def _script(answer: int, hosts: int, link: Link) -> None:
    """What the process started by `_make` does: it makes everything, sends its files through socket `answer`, and ends."""
    uid, gid = os.geteuid(), os.getegid()
    _libc("unshare", _NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        try:
            Path(f"/proc/self/{name}").write_text(text)
        except OSError as error:
            raise LinkError(f"writing /proc/self/{name} of a new user namespace: {error.strerror}") from None
    nets = []
    for _ in range(hosts + 1):
        _libc("unshare", _NEWNET)
        nets.append(os.open("/proc/self/ns/net", os.O_RDONLY))
    bridge = nets.pop()  # in which this process now is
    _tool("ip", "link add hub type bridge", "link set hub up")
    for i, net in enumerate(nets):
        _tool("ip", f"link add port{i} type veth peer name eth0 netns /proc/{os.getpid()}/fd/{net}")
    for i, net in enumerate(nets):
        _libc("setns", net, _NEWNET)
        _tool("ip", "link set lo up", f"addr add {ADDRESS.format(i + 1)}/24 dev eth0", "link set eth0 up")
        _limit("eth0", link)
        _libc("setns", bridge, _NEWNET)
        _tool("ip", f"link set port{i} up", f"link set port{i} master hub")
        _limit(f"port{i}", link)
    with socket.socket(fileno=answer) as to_launcher:
        user = os.open("/proc/self/ns/user", os.O_RDONLY)
        socket.send_fds(to_launcher, [b"made"], [user, bridge, *nets])


def _limit(device: str, link: Link) -> None:
    """Holds what leaves `device` to the link's rate, its Ethernet, IP and TCP headers included.

    A message shorter than the burst passes unhindered, so that is only what the link carries in 0.4 ms, 50 KB at 1 Gbit/s;
    with less, timers that fire late cost rate. The kernel sends TCP in pieces of up to 64 KB, and tbf splits those that
    exceed the burst, which halved the rate: they must be smaller. The queue, 50 ms and 1 MiB above the burst, never overflowed.
    """
    rate = link.gbit_per_s * 1e9 / 8
    burst = max(round(rate * 0.4e-3), 8192)
    _tool("ip", f"link set {device} gso_max_size {min(burst // 2, 65536)}")
    _tool(
        "tc",
        f"qdisc add dev {device} root tbf rate {rate * 8:.0f}bit burst {burst}b limit {rate * 0.05 + burst + 2**20:.0f}b",
    )


def _tool(name: str, *lines: str) -> None:
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if not path:
        raise LinkError(f"`{name}`, of iproute2, is not installed")
    done = subprocess.run(
        [path, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, timeout=TIMEOUT / 2, check=False
    )
    if done.returncode:
        raise LinkError(f"`{name} {'; '.join(lines)}` said: {done.stderr}")


def _libc(name: str, *args: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args):
        flag = {_NEWUSER: " of a user namespace", _NEWNET: " of a network namespace"}.get(args[-1], "")
        raise LinkError(f"{name}{flag}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    try:
        _script(int(sys.argv[1]), int(sys.argv[2]), Link.parse(sys.argv[3]))
    except (LinkError, OSError, subprocess.TimeoutExpired) as error:
        sys.exit(str(error))
