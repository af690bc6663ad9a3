"""Emulated links: what is asked for is what the ranks get, by the kernel or in software, and nothing of it is left behind."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from labkit import run
from labkit.comm import Comm
from labkit.launch import local
from labkit.launch.local import RankError, RankGroup
from labkit.links import HOSTS, Link, LinkError, Network, measured_gbit


@pytest.fixture
def kernel() -> None:
    try:
        Network(Link(1.0), 1).close()
    except LinkError as error:
        pytest.skip(f"this kernel refuses: {error}")


# -- the description -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("1gbit", Link(1.0)),
        ("200mbit", Link(0.2)),
        ("2.5gbit,50us", Link(2.5, 50.0)),
        ("1gbit,2ranks/host", Link(1.0, 0.0, 2)),
        ("999.9mbit,0.5us,4ranks/host", Link(0.9999, 0.5, 4)),
    ],
)
def test_a_link_is_what_its_text_says(text: str, link: Link) -> None:
    assert Link.parse(text) == link
    assert str(link) == text


def test_odd_numbers_survive_their_text() -> None:
    for rate in (1e-3, 1 / 3, 0.1 + 0.2, 7 / 3, 100.0):
        for latency in (0.0, 1 / 3, 1e-5):
            assert Link.parse(str(Link(rate, latency, 3))) == Link(rate, latency, 3)


@pytest.mark.parametrize("text", ["", "fast", "1", "1gb", "1gbit,50", "1gbit,2ranks/host,50us", "-1gbit", "1gbit,"])
def test_another_text_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 1gbit, 200mbit, 1gbit,50us or 1gbit,2ranks/host"):
        Link.parse(text)


@pytest.mark.parametrize("text", ["0gbit", "0.5mbit", "101gbit", "1gbit,2000000us", "1gbit,0ranks/host"])
def test_numbers_that_cannot_be_are_refused_with_those_that_can(text: str) -> None:
    with pytest.raises(ValueError, match=r"use (0\.001 \(1mbit\) to 100 \(100gbit\)|0 to 1000000|a whole number)"):
        Link.parse(text)


def test_a_message_takes_its_latency_and_its_bytes() -> None:
    assert Link(1.0, 50.0).seconds(125_000) == pytest.approx(0.001 + 0.00005)


# -- what ranks get ------------------------------------------------------------------------------------------------------


def namespace(comm: Comm) -> str:
    comm.barrier()
    return os.readlink("/proc/self/ns/net")


@pytest.mark.usefixtures("kernel")
def test_each_host_has_a_network_of_its_own() -> None:
    a, b, c, d = run(namespace, ranks=4, link=Link(1.0, ranks_per_host=2))
    assert a == b and c == d and len({a, c, os.readlink("/proc/self/ns/net")}) == 3


@pytest.mark.usefixtures("kernel")
def test_a_rank_has_eth0_and_its_users_files(tmp_path: Path) -> None:
    def look(comm: Comm) -> tuple[list[str], str]:
        (tmp_path / f"{comm.rank}").write_text("")
        return [name for _, name in socket.if_nameindex()], os.environ["GLOO_SOCKET_IFNAME"]

    for names, gloo in run(look, ranks=2, link=Link(1.0)):
        assert (sorted(names), gloo) == (["eth0", "lo"], "eth0")
    assert {(tmp_path / str(rank)).stat().st_uid for rank in range(2)} == {os.geteuid()}


@pytest.mark.parametrize("how", ["kernel", "software"])
def test_no_transfer_is_faster_than_the_link(
    how: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A lower bound of time, which a busy machine cannot break; less the bursts that tbf lets pass."""
    if how == "kernel":
        request.getfixturevalue("kernel")
    monkeypatch.setenv("LABKIT_LINKS", how)
    link = Link.parse("50mbit")

    def transfer(comm: Comm) -> tuple[float, float]:
        x = torch.full((125_000,), 1.0)
        comm.barrier()
        began = time.perf_counter()
        comm.all_reduce(x)
        return time.perf_counter() - began, x.unique().item()

    for seconds, value in run(transfer, ranks=2, link=link):
        assert seconds > 0.95 * link.seconds(500_000)
        assert value == 2


@pytest.mark.usefixtures("kernel")
def test_what_several_hosts_send_to_one_shares_its_link() -> None:
    link = Link.parse("50mbit")

    def gather(comm: Comm) -> float:
        x = torch.ones(2, 62_500)
        comm.barrier()
        began = time.perf_counter()
        if comm.rank:
            comm.send(x[0], 0, "world")
            comm.flush()
        else:
            for work in [
                dist.irecv(x[source - 1], source) for source in (1, 2)
            ]:  # both at once: a sender waits for this
                work.wait()
        return time.perf_counter() - began

    assert run(gather, ranks=3, link=link)[0] > 0.95 * link.seconds(500_000)


def test_the_achieved_rate_is_measured_on_all_ranks_and_not_counted() -> None:
    def measure(comm: Comm) -> tuple[float, int]:
        return measured_gbit(comm, 1), len(comm.tallies)

    for gbit, counted in run(measure, ranks=2, link=Link.parse("100mbit")):
        assert 0 < gbit < 0.11
        assert counted == 0


# -- where the kernel does not do it -------------------------------------------------------------------------------------


def serve(comm: Comm, channel: Any) -> None:
    channel.send((comm.all_reduce(torch.ones(1)).item(), os.readlink("/proc/self/ns/net")))


def label_of(link: Link) -> str:
    """Runs two ranks, which must be in the launcher's own network."""
    with RankGroup(serve, 2, link=link) as group:
        for _ in range(2):
            assert group.receive(20)[1] == (2.0, os.readlink("/proc/self/ns/net"))
        return group.link_label


def test_software_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_LINKS", "software")
    assert label_of(Link(1.0)) == "1 Gbit/s, software-emulated (LABKIT_LINKS=software)"


def test_in_software_a_message_takes_its_time_from_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes_on(comm: Comm) -> float:
        if comm.rank == 0:
            time.sleep(0.5)  # the receiver has been waiting for longer than the message takes
            comm.send(torch.zeros(25_000), 1)
            return 0.0
        began = time.monotonic()
        comm.recv(torch.zeros(25_000), 0)
        return time.monotonic() - began

    monkeypatch.setenv("LABKIT_LINKS", "software")
    assert run(passes_on, 2, link="2mbit")[1] >= 0.85  # 100 KB at 2 Mbit/s: 0.4 s, after some 0.5 s


def test_latency_is_left_to_software() -> None:
    assert label_of(Link(0.2, 50.0)) == "200 Mbit/s + 50 us, software-emulated (tbf limits a rate and adds no latency)"


@pytest.mark.usefixtures("kernel")
def test_what_a_tool_says_is_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tc").write_text("#!/bin/sh\necho Error: no such qdisc >&2\nexit 2\n")
    (tmp_path / "tc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    label = label_of(Link(1.0))
    assert label.startswith("1 Gbit/s, software-emulated (`tc qdisc add dev eth0 root tbf rate 1000000000bit ")
    assert label.endswith("` said: Error: no such qdisc)")


@pytest.mark.usefixtures("kernel")
def test_the_kernel_says_its_name() -> None:
    with RankGroup(serve, 2, link=Link(1.0, ranks_per_host=2)) as group:
        assert group.link_label == "1 Gbit/s, 2 ranks per host, tc tbf in network namespaces"
    with RankGroup(serve, 1) as group:
        assert group.link_label == ""


def test_links_are_for_local_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(local, "pick_backend", lambda ranks: ("nccl", "cuda"))
        with pytest.raises(ValueError, match="link='1gbit' on GPUs: .* local CPU ranks only"):
            run(namespace, ranks=2, link=Link(1.0))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="link='1gbit' on torchrun's ranks: .* local CPU ranks only"):
        run(namespace, ranks=2, link=Link(1.0))


def test_too_many_hosts_are_refused() -> None:
    with pytest.raises(ValueError, match=f"use at most {HOSTS} hosts"):
        Network(Link(1.0), HOSTS + 1)


# -- what is left --------------------------------------------------------------------------------------------------------


def namespaces(of: str = "[0-9]*") -> set[str]:
    """Network and user namespaces that processes are in, or hold files of."""
    found = set()
    for pattern in (f"{of}/ns/net", f"{of}/ns/user", f"{of}/fd/*"):
        for path in Path("/proc").glob(pattern):
            try:
                found.add(os.readlink(path))
            except OSError:  # it has just ended, or is somebody else's
                continue
    return {name for name in found if name.startswith(("net:", "user:"))}


def gone(made: set[str], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while made & namespaces() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not made & namespaces()


def returns(comm: Comm, channel: Any) -> None:
    channel.send("here")


def raises(comm: Comm, channel: Any) -> None:
    channel.send("here")
    comm.barrier()
    raise ZeroDivisionError


def dies(comm: Comm, channel: Any) -> None:
    channel.send("here")
    comm.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("fn", [returns, raises, dies])
def test_nothing_is_left_when_ranks_end(fn: Any) -> None:
    before = namespaces("self")
    group = RankGroup(fn, 2, link=Link(1.0))
    made = namespaces("self") - before
    assert len(made) == 4  # a user namespace; network namespaces of the bridge and of two hosts
    try:
        with group:
            while True:
                group.receive(1)
    except RankError as error:
        assert fn is returns or error.how != "timeout"
    assert gone(made)


@pytest.mark.usefixtures("kernel")
def test_a_network_that_is_dropped_goes_and_no_child_inherits_it() -> None:
    before = namespaces("self")
    network = Network(Link(1.0), 2)
    made = namespaces("self") - before
    child = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False, check=True)
    assert not [name for name in made if name in child.stdout]
    assert set(map(os.readlink, network.where(0) + network.where(1))) < made
    del network
    gc.collect()
    assert gone(made)


@pytest.mark.usefixtures("kernel")
def test_nothing_is_left_when_the_launcher_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom labkit import run\nfrom labkit.links import Link\n"
        "def work(comm):\n    comm.barrier()\n    print('up', flush=True)\n    time.sleep(100)\n"
        "run(work, ranks=2, link=Link(1.0))\n"
    )
    before = namespaces("self")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and "up" in process.stdout.readline()
    made = namespaces(str(process.pid)) - before
    assert len(made) == 4
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert gone(made)
    process.stdout.close()
