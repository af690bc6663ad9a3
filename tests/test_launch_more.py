"""The launcher where it is easy to get wrong: who is blamed, what is left behind, what a rank sees of its notebook."""

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from labkit import run
from labkit.comm import Comm
from labkit.launch.local import RankError, RankGroup


def ranks_alive() -> list[psutil.Process]:
    return [rank for server in servers() for rank in server.children() if rank.status() != psutil.STATUS_ZOMBIE]


def servers() -> list[psutil.Process]:
    running = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in running if "forkserver" in " ".join(p.cmdline())]


@pytest.fixture(autouse=True)
def nothing_is_left_and_the_next_run_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    gc.collect()
    assert not ranks_alive()
    assert not [*folder.glob("labkit-*"), *folder.glob("pytorch-errorfile-*")]
    assert run(lambda comm: comm.rank, ranks=2) == [0, 1]


# -- who is blamed -------------------------------------------------------------------------------------------------------


def dies_while_the_other_hides_why(comm: Comm) -> None:
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        comm.all_reduce(torch.ones(2))
    except RuntimeError:
        raise KeyError("lost") from None


def dies_without_comm(comm: Comm) -> None:
    if comm.rank == 1:
        for connection in psutil.Process().net_connections("tcp"):  # so that rank 0 fails first
            if connection.raddr:
                socket.socket(fileno=connection.fd).shutdown(socket.SHUT_RDWR)
        time.sleep(0.2)
        os._exit(3)
    dist.all_reduce(torch.ones(2))


def all_raise(comm: Comm) -> None:
    comm.barrier()
    raise ZeroDivisionError("everywhere")


def crashes(comm: Comm) -> None:
    if comm.rank == 1:
        import ctypes

        ctypes.string_at(0)
    comm.all_reduce(torch.ones(2))


def leaves_by_exit(comm: Comm) -> None:
    if comm.rank == 1:
        sys.exit("no more")
    comm.all_reduce(torch.ones(2))


@pytest.mark.parametrize(
    ("fn", "rank", "said"),
    [
        (dies_while_the_other_hides_why, 1, "rank 1 of 2 was killed by SIGKILL"),
        (dies_without_comm, 1, "rank 1 of 2 exited with code 3"),
        (all_raise, 0, "rank 0 of 2 raised ZeroDivisionError: everywhere(.|\n)*rank 1 raised ZeroDivisionError"),
        (crashes, 1, "rank 1 of 2 was killed by SIGSEGV(.|\n)*in crashes: ctypes.string_at"),
        (leaves_by_exit, 1, "rank 1 of 2 raised SystemExit: no more"),
    ],
)
def test_the_cause_is_named_and_not_its_victims(fn: Any, rank: int, said: str) -> None:
    with pytest.raises(RankError, match=said) as caught:
        run(fn, ranks=2)
    assert caught.value.rank == rank


def test_a_rank_that_waits_for_one_that_has_returned_says_so() -> None:
    def returns_early(comm: Comm) -> None:
        if comm.rank == 1:
            comm.all_reduce(torch.ones(2), what="late")

    with pytest.raises(RankError, match="all_reduce of late(.|\n)*rank 0 had returned") as caught:
        run(returns_early, ranks=2, collective_timeout=2)
    assert caught.value.rank == 1


def test_an_error_shows_where_every_rank_was_and_only_the_callers_frames() -> None:
    def helper(comm: Comm) -> None:
        if comm.rank == 1:
            time.sleep(0.5)
            raise ValueError("two lines" + chr(10) + "the second")
        comm.all_reduce(torch.ones(2))

    with pytest.raises(RankError) as caught:
        run(helper, ranks=2)
    text, trace = str(caught.value).split("\n\n")
    assert text.startswith("rank 1 of 2 raised ValueError: two lines\n") and "in helper: raise ValueError" in text
    assert "rank 0 waited" in text
    assert "\nthe second" in trace and "labkit/launch" not in trace
    assert caught.value.how == "raised" and caught.value.kind == "ValueError"
    assert caught.value._render_traceback_()[0].startswith("RankError: rank 1 of 2 raised ValueError")


def test_time_that_is_up_is_not_a_ranks_fault() -> None:
    with pytest.raises(RankError, match="not finished after 1 s") as caught:
        run(lambda comm: time.sleep(100), ranks=2, timeout=1)
    assert caught.value.rank is None and caught.value.how == "timeout"
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_a_short_collective_timeout_is_none_for_starting_up() -> None:
    assert run(lambda comm: comm.all_reduce(torch.ones(1)).item(), ranks=4, collective_timeout=0.5) == [4.0] * 4


def test_the_world_axis_and_the_others_have_the_timeout_asked_for() -> None:
    def waits(comm: Comm, axis: str) -> None:
        if comm.rank:
            time.sleep(100)
        comm.all_reduce(torch.ones(1), axis)

    for axis in ("world", "tp"):
        began = time.monotonic()
        with pytest.raises(RankError, match="Timed out waiting"):
            run(waits, ranks=2, args=(axis,), collective_timeout=1)
        assert time.monotonic() - began < 10


# -- what is left behind -------------------------------------------------------------------------------------------------


def busy(comm: Comm, channel: Any) -> None:
    channel.send("up")
    while True:
        comm.all_reduce(torch.ones(2))


def idle(comm: Comm, channel: Any) -> None:
    while True:
        try:
            channel.send(channel.receive())
        except EOFError:
            print("goodbye")
            return


def test_a_group_is_closed_politely_and_last_words_are_heard(capsys: pytest.CaptureFixture[str]) -> None:
    with RankGroup(idle, 2) as group:
        group.send(torch.ones(3))
        assert torch.equal(group.receive(10)[1], torch.ones(3))
    assert sorted(capsys.readouterr().out.splitlines()) == ["[rank 0] goodbye", "[rank 1] goodbye"]
    with pytest.raises(ValueError, match="closed"):
        group.receive()


def test_busy_ranks_are_ended_by_close_and_by_dropping_the_group() -> None:
    with RankGroup(busy, 2) as group:
        group.receive(10)
    assert not ranks_alive()
    group = RankGroup(busy, 2)
    assert len(ranks_alive()) == 2
    del group
    gc.collect()
    assert not ranks_alive()


def test_a_rank_of_a_group_that_dies_while_nobody_listens_is_reported_by_the_next_call() -> None:
    group = RankGroup(idle, 2)
    while not all(doing.waiting for doing in group._board.read()):
        time.sleep(0.01)
    os.kill(group.pids[1], signal.SIGKILL)
    time.sleep(0.3)
    with pytest.raises(RankError, match="rank 1 of 2 was killed by SIGKILL while it waited .* in its channel"):
        group.send("hello")
        group.receive(10)
        group.receive(10)


def test_a_rank_that_prints_without_end_meets_its_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    def chatters(comm: Comm) -> None:
        while True:
            print("x" * 1000)

    with pytest.raises(RankError, match="not finished after 1 s"):
        run(chatters, ranks=2, timeout=1)


def test_the_fork_server_may_die() -> None:
    [server] = servers()
    group = RankGroup(busy, 2)
    pids = group.pids
    server.kill()
    with pytest.raises(RankError, match="exited with code"):
        while True:
            group.receive(10)
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_runs_in_a_thread_work() -> None:
    values: list[Any] = []
    thread = threading.Thread(target=lambda: values.extend(run(lambda comm: comm.rank, ranks=2)))
    thread.start()
    thread.join()
    assert values == [0, 1]


# -- what travels --------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    x: float


def test_values_are_copies_that_outlive_their_ranks() -> None:
    def makes(comm: Comm) -> dict[str, Any]:
        half = torch.full((3, 5), float(comm.rank)).to(torch.bfloat16)
        return {
            "half": half,
            "view": torch.arange(12).view(3, 4)[1:, 2:],
            "big": torch.ones(3_000_000),
            "p": Point(1.5),
        }

    for rank, value in enumerate(run(makes, ranks=2)):
        assert value["half"].dtype == torch.bfloat16 and (value["half"] == rank).all()
        assert value["view"].tolist() == [[6, 7], [10, 11]]
        assert value["big"].sum() == 3_000_000 and not value["big"].is_shared()
        assert isinstance(value["p"], Point)


def test_what_cannot_be_sent_is_refused_before_ranks_start() -> None:
    lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot be sent to ranks"):
        run(lambda comm: lock, ranks=2)


def test_a_rank_sees_the_launchers_environment_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LABKIT_TEST", "of this moment")
    monkeypatch.chdir(tmp_path)
    names = ("LABKIT_TEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    seen = run(lambda comm: ([os.environ.get(name) for name in names], Path.cwd(), torch.get_num_threads()), ranks=2)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert seen == [(["of this moment", str(r), str(r), "2", None], tmp_path, threads) for r in range(2)]


def test_gloo_listens_on_the_loopback_only() -> None:
    def listening(comm: Comm) -> list[str]:
        comm.barrier()
        found = psutil.Process().net_connections("inet")
        comm.barrier()
        return [c.laddr.ip for c in found]

    for addresses in run(listening, ranks=2):
        assert addresses and all(ip in ("127.0.0.1", "::1") for ip in addresses)


# -- scripts -------------------------------------------------------------------------------------------------------------


def script(tmp_path: Path, text: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, *command, str(path)], capture_output=True, text=True, timeout=100, check=False, **options
    )


def test_a_script_may_define_classes_start_at_top_level_and_forget_to_close(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        """
        from labkit import run
        from labkit.launch.local import RankGroup
        print("once")
        class Value:
            def __init__(self, n): self.n = n
        def work(comm): return Value(comm.rank)
        print([type(v) is Value and v.n for v in run(work)])
        def serve(comm, channel): channel.receive()
        group = RankGroup(serve, 2)
        print(*group.pids)
        """,
    )
    assert done.returncode == 0, done.stderr
    once, values, pids = done.stdout.splitlines()
    assert (once, values, done.stderr) == ("once", "[0, 1]", "")
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.split())


def test_an_interrupt_while_the_first_ranks_start_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "from labkit import run\nprint('go', flush=True)\nrun(lambda comm: __import__('time').sleep(100))\n"
    )
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline()
    family = psutil.Process(process.pid)
    while not any("forkserver" in " ".join(p.cmdline()) for p in family.children()):
        time.sleep(0.01)
    time.sleep(0.5)  # the fork server is importing torch
    children = family.children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_torchrun_joins_in_place(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        """
        import os, torch
        from labkit.launch.local import in_torchrun, join_torchrun
        from labkit import Layout
        assert in_torchrun()
        for _ in range(2):  # a second engine uses the same process group
            comm = join_torchrun(Layout(tp=2), collective_timeout=20)
            total = comm.all_reduce(torch.ones(1) * (comm.rank + 1)).item()
        print(f"{total} {len(os.sched_getaffinity(0))} {torch.get_num_threads()}\\n", end="", flush=True)
        """,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"3.0 {share} {share}"] * 2
