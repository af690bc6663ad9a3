"""Real ranks that return, raise, die, hang and disagree: one readable error each, nothing left behind, and life goes on."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from labkit import Layout, run
from labkit.comm import Comm
from labkit.launch.local import RankError, RankGroup
from labkit.split import LayoutError


def ranks_alive() -> list[psutil.Process]:
    """Processes forked by our fork server: every rank of ours that has not ended."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return [rank for server in servers for rank in server.children() if rank.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def nothing_is_left_and_the_next_run_works(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("tmp")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not ranks_alive()
    assert not list(folder.glob("labkit-*"))
    assert run(lambda comm: comm.rank, ranks=2) == [0, 1]


def test_values_come_back_in_rank_order_from_a_closure() -> None:
    factor = 10

    def scaled(comm: Comm, add: int) -> tuple[int, torch.Tensor]:
        return factor * comm.rank + add, comm.all_reduce(torch.ones(2))

    values = run(scaled, ranks=3, args=(5,))
    assert [v[0] for v in values] == [5, 15, 25]
    assert all(torch.equal(v[1], torch.full((2,), 3.0)) for v in values)


def test_output_is_labelled_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    def talk(comm: Comm) -> None:
        print(f"hello\nfrom {comm.rank}", end="")
        print("trouble", file=sys.stderr)

    run(talk, ranks=2)
    seen = capsys.readouterr()
    assert sorted(seen.out.splitlines()) == ["[rank 0] from 0", "[rank 0] hello", "[rank 1] from 1", "[rank 1] hello"]
    assert sorted(seen.err.splitlines()) == ["[rank 0] trouble", "[rank 1] trouble"]


def test_each_rank_has_its_own_core_where_there_are_enough() -> None:
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("needs two cores")
    cores = run(lambda comm: os.sched_getaffinity(0), ranks=2)
    assert not cores[0] & cores[1] and cores[0] | cores[1] <= usable
    too_many = len(usable) + 1
    assert run(lambda comm: os.sched_getaffinity(0), ranks=too_many) == [usable] * too_many


def raises(comm: Comm) -> None:
    if comm.rank == 1:
        raise ValueError("the one cause")
    comm.all_reduce(torch.ones(2))


def exits(comm: Comm) -> None:
    if comm.rank == 1:
        os._exit(3)
    comm.all_reduce(torch.ones(2))


def dies(comm: Comm) -> None:
    for i in range(1000):
        if comm.rank == 1 and i == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.all_reduce(torch.ones(2), "tp", "attention")


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (raises, r"rank 1 of 3 raised ValueError: the one cause(.|\n)*in raises"),
        (exits, r"rank 1 of 3 exited with code 3 while it was computing"),
        (
            dies,
            r"rank 1 of 3 was killed by SIGKILL while it was computing \(its last operation was number 100, all_reduce",
        ),
    ],
)
def test_the_rank_that_failed_is_named_within_five_seconds(fn: object, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=said) as caught:
        run(fn, ranks=3)  # type: ignore[arg-type]
    assert time.monotonic() - began < 5
    assert caught.value.rank == 1


def sleeps(comm: Comm) -> None:
    if comm.rank == 1:
        time.sleep(100)
    comm.all_reduce(torch.ones(2), what="logits")


def mixes_operations(comm: Comm) -> None:
    if comm.rank == 1:
        comm.all_gather(torch.ones(2))
    else:
        comm.all_reduce(torch.ones(2))


def mixes_sizes(comm: Comm) -> None:
    comm.all_reduce(torch.ones(2 if comm.rank else 200_000))


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (sleeps, [r"rank 0: all_reduce of logits on axis world \(its operation 1\) failed", "in sleeps"]),
        (mixes_operations, ["all_reduce on axis world", "all_gather on axis world"]),
        (mixes_sizes, ["all_reduce on axis world"]),
    ],
)
def test_ranks_that_do_not_meet_end_within_fifteen_seconds(fn: object, said: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        run(fn, ranks=2)  # type: ignore[arg-type]
    assert time.monotonic() - began < 15
    for pattern in said:
        assert caught.match(pattern)


def test_an_endless_loop_ends_at_the_timeout_and_is_located() -> None:
    def spins(comm: Comm) -> None:
        while comm.rank == 1:
            pass

    with pytest.raises(RankError, match=r"not finished after 2 s:\n  rank 1 was computing(.|\n)*in spins"):
        run(spins, ranks=2, timeout=2)


def test_a_stopped_rank_ends_too() -> None:
    def stops(comm: Comm) -> None:
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        comm.all_reduce(torch.ones(2))

    with pytest.raises(RankError, match="rank 0: all_reduce on axis world"):
        run(stops, ranks=2, collective_timeout=3)


def test_a_value_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 0 of 1 raised TypeError: .*generator"):
        run(lambda comm: (i for i in range(3)), ranks=1)


def test_wrong_numbers_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="ranks=0: use 1 or more"):
        run(raises, ranks=0)
    with pytest.raises(LayoutError, match="ranks=3 does not fit tp=2 x pp=1 x dp=1"):
        run(raises, ranks=3, layout=Layout(tp=2))


def echo(comm: Comm, channel: object) -> None:
    while True:
        try:
            message = channel.receive()  # type: ignore[attr-defined]
        except EOFError:
            return
        channel.send((message, comm.rank))  # type: ignore[attr-defined]


def test_a_group_takes_messages_until_it_is_closed() -> None:
    with RankGroup(echo, 2) as group:
        for word in ("one", "two"):
            group.send(word)
            assert sorted(group.receive(10) for _ in range(2)) == [(0, (word, 0)), (1, (word, 1))]
        pids = group.pids
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    group.close()  # a second time does nothing


def test_two_groups_at_once_do_not_meet() -> None:
    with RankGroup(echo, 2) as a, RankGroup(echo, 2) as b:
        a.send("a")
        b.send("b")
        assert {b.receive(10)[1][0] for _ in range(2)} == {"b"}
        assert {a.receive(10)[1][0] for _ in range(2)} == {"a"}


def test_many_runs_do_not_gather_files() -> None:
    run(lambda comm: None, ranks=2)
    before = psutil.Process().num_fds()
    for _ in range(15):
        run(lambda comm: None, ranks=2)
    assert psutil.Process().num_fds() <= before


# -- the launcher itself is interrupted or dies, and scripts as people write them ------------------------------------------

SCRIPT = """
import time, torch
from labkit import run

def work(comm):
    print("pid", __import__("os").getpid(), flush=True)
    for _ in range(100000):
        comm.all_reduce(torch.ones(10))
        time.sleep({pause})
        if {once}:
            return comm.rank

print("values", run(work, ranks=2, timeout=100), flush=True)
"""


def start(tmp_path: Path, *, once: bool) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(pause=0.01, once=once)))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout
    return [int(process.stdout.readline().split()[-1]) for _ in range(2)]


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_a_plain_script_needs_no_main_guard(tmp_path: Path) -> None:
    process = start(tmp_path, once=True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "values [0, 1]" in out and out.count("pid") == 2


def test_an_interrupt_ends_the_ranks_and_reaches_the_caller(tmp_path: Path) -> None:
    process = start(tmp_path, once=False)
    pids = rank_pids(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    assert gone(pids)


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, once=False)
    pids = rank_pids(process)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.communicate(timeout=20)
    assert gone([*pids, *children])


def test_torchrun_runs_llm_in_place(tmp_path: Path) -> None:
    """That LLM gives the same tokens there is tested with the command line; here: a world that doesn't fit is refused."""
    script = tmp_path / "script.py"
    script.write_text("from labkit import LLM\nLLM(tensor_parallel_size=3)\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "torchrun started 2 ranks; tp=3 x pp=1 x dp=1 needs 3" in done.stderr
