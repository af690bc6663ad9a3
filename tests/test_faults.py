"""A table of faults. Each strikes a rank of a running engine, and ends in one clear error, in time, with nothing left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
from test_async_llm import engine, last
from test_batching import llm_of, model
from test_launch import ranks_alive

from labkit import LLM, SamplingParams
from labkit.engine import llm as llm_module
from labkit.launch import local
from labkit.launch.local import RankError, RankGroup
from labkit.launch.rank import main as rank_main
from labkit.model.find import find

__all__ = ["model"]  # a fixture
PROMPTS = [[i, i + 1, i + 2] * 20 for i in range(6)]
PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=24, ignore_eos=True)
OPTIONS = {"max_num_batched_tokens": 64}  # so that there are several steps of prefill


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    with llm_of(model, {}) as llm:
        return tokens(llm)


def tokens(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)]


def belongings() -> dict[str, Any]:
    """What this process has, and what it could leave on the machine."""
    me = psutil.Process()
    return {
        "files": me.num_fds(),
        "threads": me.num_threads(),
        "shared memory": {p.name for p in Path("/dev/shm").iterdir()},
        "temporary": {p.name for p in Path(tempfile.gettempdir()).iterdir()},
    }


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]) -> Iterator[None]:
    """Checks after the test that all is as before it. (`expected`: what is started once, as the fork server, is there before.)"""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = belongings()
    yield
    assert not ranks_alive()
    assert belongings() == before


KILLED = r"rank {rank} of 2 was killed by SIGKILL"
HANGS = r"rank {rank} of 2 hangs: for \d+ s it has"
TABLE = [
    # fault, when, what is said, seconds
    (faults.killed, "load", KILLED, 5),
    (faults.killed, "prefill", KILLED, 5),
    (faults.killed, "decode", KILLED, 5),
    (faults.crashing, "decode", "rank {rank} of 2 was killed by SIGSEGV", 5),
    (faults.leaving, "prefill", "rank {rank} of 2 exited with code 3", 5),
    (faults.raising, "load", "rank {rank} of 2 raised ZeroDivisionError: the one cause", 5),
    (faults.raising, "prefill", "rank {rank} of 2 raised ZeroDivisionError: the one cause", 5),
    (faults.raising, "decode", "rank {rank} of 2 raised ZeroDivisionError: the one cause", 5),
    (faults.out_of_memory, "load", r"rank {rank} of 2 raised RuntimeError: .*allocate memory", 5),
    (faults.out_of_memory, "decode", r"rank {rank} of 2 raised RuntimeError: .*allocate memory", 5),
    (faults.stopped, "load", HANGS + r" been stopped \(SIGSTOP\)", 15),
    (faults.stopped, "decode", HANGS + r" been stopped \(SIGSTOP\)", 15),
    (faults.silent, "prefill", HANGS + " neither waited for another rank nor computed", 15),
]
LAYOUTS = [{"tp": 2}, {"pp": 2}]


def cases() -> Iterator[Any]:
    """Every fault in both layouts, slow ones in one; of ranks, each has its turn."""
    for number, (fault, when, said, limit) in enumerate(TABLE):
        for which, degrees in enumerate(LAYOUTS):
            if limit < 10 or number % 2 == which:
                rank, layout = (number + which) % 2, "tp" if "tp" in degrees else "pp"
                name = f"rank {rank} {fault.__name__} in {when}, {layout}=2"
                yield pytest.param(fault, when, said.format(rank=rank), limit, degrees, rank, id=name)


@pytest.mark.parametrize(("fault", "when", "said", "limit", "degrees", "rank"), [*cases()])
@pytest.mark.usefixtures("nothing_left")
def test_a_rank_at_fault_is_named_in_time_and_the_next_call_works(
    fault: faults.Fault, when: str, said: str, limit: float, degrees: dict[str, int], rank: int,
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
) -> None:  # fmt: skip
    found = find(model)
    faulty = faults.Faulty(found.name, found.config, found.folder, fault, rank, when, tmp_path / "struck")
    monkeypatch.setattr(llm_module, "find", lambda name: faulty)
    if fault is not faults.silent:  # one case is enough that waits as long as a user would
        monkeypatch.setattr(llm_module, "HANG", 2)
    began = time.monotonic()
    if when == "load":
        with pytest.raises(RankError, match=said) as caught:
            llm_of(model, degrees, **OPTIONS)
        llm = llm_of(model, degrees, **OPTIONS)
    else:
        llm = llm_of(model, degrees, **OPTIONS)
        with pytest.raises(RankError, match=said) as caught:
            tokens(llm)
    assert time.monotonic() - began < limit
    assert caught.value.rank == rank and (tmp_path / "struck").exists()
    assert tokens(llm) == expected
    llm.close()


DEADLOCKS = [
    # fault, degrees, options, what is said
    (
        faults.disagreeing,
        {"tp": 2},
        {},
        "all_reduce of embedding.*rank 1 is in another operation: all_gather of 20 bytes",
    ),
    (
        faults.disagreeing,
        {"pp": 2},
        {},
        "broadcast of last_hidden.*rank 1 is in another operation: all_gather of 20 bytes",
    ),
    (
        faults.disagreeing,
        {"pp": 2},
        {"shared_memory": False},
        "for each other for . s:(.|\n)*broadcast of last_hidden(.|\n)*all_gather of another",
    ),
    (faults.disagreeing, {"tp": 2}, {"shared_memory": False}, "for each other for . s:(.|\n)*all_reduce of embedding"),
    (faults.off_the_network, {"tp": 2}, {"link": "1gbit"}, "for each other for . s:(.|\n)*all_reduce of embedding"),
]


@pytest.mark.parametrize(("fault", "degrees", "options", "said"), DEADLOCKS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.usefixtures("nothing_left")
def test_ranks_that_wait_for_each_other_are_found_and_the_next_call_works(
    fault: faults.Fault, degrees: dict[str, int], options: dict[str, Any], said: str,
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
) -> None:  # fmt: skip
    found = find(model)
    faulty = faults.Faulty(found.name, found.config, found.folder, fault, 1, "decode", tmp_path / "struck")
    monkeypatch.setattr(llm_module, "find", lambda name: faulty)
    monkeypatch.setattr(llm_module, "HANG", 2)
    with llm_of(model, degrees, **OPTIONS, **options) as llm:
        if "software" in ((llm.report()["link"] or {}).get("label", "")):
            pytest.skip(llm.report()["link"]["label"])
        began = time.monotonic()
        with pytest.raises(RankError, match=said):
            tokens(llm)
        assert time.monotonic() - began < 8
        assert tokens(llm) == expected


def test_an_interrupt_at_any_of_50_moments_leaves_nothing_and_the_next_call_works(model: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("interrupted.py")
    command = [sys.executable, str(script), model, "50", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all well\n") and int(done.stdout.split()[1].rstrip(",")) > 20


@pytest.mark.usefixtures("nothing_left")
def test_a_hundred_engines_come_and_go(model: str, expected: list[list[int]]) -> None:
    process, sizes = psutil.Process(), []
    for number in range(100):
        with llm_of(model, LAYOUTS[number % 2], **OPTIONS) as llm:
            if number % 10 == 0:
                assert tokens(llm) == expected
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[20] < 4e6, "the process grows by more than 50 kB for each engine"


@pytest.mark.usefixtures("nothing_left")
def test_two_engines_at_once_do_not_meet(model: str, expected: list[list[int]]) -> None:
    with llm_of(model, {"tp": 2}) as one, llm_of(model, {"pp": 2}) as other, ThreadPoolExecutor() as pool:
        for _ in range(3):
            assert [*pool.map(tokens, [one, other])] == [expected] * 2
        os.kill(other.ranks().pids[0], signal.SIGKILL)
        running = pool.submit(tokens, one)
        with pytest.raises(RankError, match="rank 0 of 2 was killed"):
            tokens(other)
        assert running.result() == expected


# -- going on where ranks have failed ------------------------------------------------------------------------------------

STRIKES = [
    # fault, degrees, rank, when
    (faults.killed, {"tp": 2}, 1, "decode"),
    (faults.killed, {"pp": 2}, 0, "prefill"),
    (faults.raising, {"pp": 2}, 1, "decode"),
    (faults.leaving, {"dp": 2}, 1, "decode"),
]


@pytest.mark.parametrize(("fault", "degrees", "rank", "when"), STRIKES, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("live", [False, True], ids=["LLM", "AsyncLLM"])
@pytest.mark.usefixtures("nothing_left")
def test_with_restart_every_request_gets_what_it_would_have_got(
    fault: faults.Fault, degrees: dict[str, int], rank: int, when: str, live: bool,
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]],
) -> None:  # fmt: skip
    found = find(model)
    faulty = faults.Faulty(found.name, found.config, found.folder, fault, rank, when, tmp_path / "struck")
    monkeypatch.setattr(llm_module, "find", lambda name: faulty)

    async def served() -> list[list[int]]:
        async with engine(model, degrees, restart=True, **OPTIONS) as llm:
            outputs = await asyncio.gather(*(last(llm.generate(prompt, PARAMS)) for prompt in PROMPTS))
            assert llm.stats()["restarts"] == 1 and llm.failed is None
            assert sum(len(o.outputs[0].token_ids) for o in outputs) == llm.stats()["generation_tokens"]
        return [o.outputs[0].token_ids for o in outputs]

    if live:
        assert asyncio.run(asyncio.wait_for(served(), 60)) == expected
    else:
        with llm_of(model, degrees, restart=True, **OPTIONS) as llm:
            began = time.perf_counter()
            outputs = llm.generate(PROMPTS, PARAMS)
            took, report = time.perf_counter() - began, llm.report()
        assert [o.outputs[0].token_ids for o in outputs] == expected
        assert report["restarts"] == 1
        # Time counts from the beginning, not from the restart.
        assert max(o.metrics.ttft_s + (o.metrics.tpot_s or 0) * 23 for o in outputs) == pytest.approx(took, abs=0.3)
    assert (tmp_path / "struck").exists()


def test_a_string_to_stop_at_is_found_across_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "tensor_parallel_size": 2}
    prompt, found = "Count: one, two, three, four,", find("smollm2-135m")
    with LLM(**options) as llm:
        text = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=12))[0].outputs[0].text
        # The strike comes behind the third token; the string begins before and ends after that.
        params = SamplingParams(temperature=0.0, max_tokens=12, stop=text[3:16])
        [right] = llm.generate(prompt, params)
    faulty = faults.Faulty(found.name, found.config, found.folder, faults.killed, 1, "decode", tmp_path / "struck")
    monkeypatch.setattr(llm_module, "find", lambda name: faulty)
    with LLM(**options, restart=True) as llm:
        [output] = llm.generate(prompt, params)
    assert (tmp_path / "struck").exists()
    assert right.outputs[0].finish_reason == "stop" and right.outputs[0].text == text[:3]
    assert output.outputs == right.outputs


@pytest.mark.usefixtures("nothing_left")
def test_what_there_was_comes_with_the_error_and_a_fault_that_comes_back_is_given_up(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    found = find(model)
    for restart, marks in ((False, 1), (True, 4)):
        folder = tmp_path / str(restart)
        folder.mkdir()
        faulty = faults.Faulty(found.name, found.config, found.folder, faults.killed, 1, "decode", folder, always=True)
        monkeypatch.setattr(llm_module, "find", lambda name, faulty=faulty: faulty)
        llm = llm_of(model, {"tp": 2}, restart=restart, **OPTIONS)
        with pytest.raises(RankError, match="rank 1 of 2 was killed") as caught:
            llm.generate(PROMPTS, replace(PARAMS, max_tokens=200))  # too many for any to be finished in between
        assert len(list(folder.iterdir())) == marks
        for output, right in zip(caught.value.outputs, expected, strict=True):
            got = output.outputs[0]
            assert got.finish_reason == "error" and 0 < len(got.token_ids) < 200
            assert got.token_ids[:24] == right[: len(got.token_ids)]


FULL_DISK = """
import os, sys, tempfile
from pathlib import Path
from labkit import run
from labkit.model.errors import ModelError
from labkit.model.find import find

disk = Path(sys.argv[1])
os.environ["LABKIT_CACHE"] = str(disk / "cache")
try:
    find("smollm2-135m")
except ModelError as error:
    print(error)
print([path.name for path in (disk / "cache" / "models").iterdir() if path.is_dir()])
with open(disk / "filler", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
tempfile.tempdir = str(disk)
try:
    run(lambda comm: None, ranks=2)
except OSError as error:
    print(error)
print(list(disk.glob("labkit-*")))
(disk / "filler").unlink()
print(run(lambda comm: comm.rank, ranks=2))
"""


def test_a_full_disk_is_named_and_nothing_half_made_stays_on_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=50m none {disk} && exec {sys.executable} {script} {disk}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if not done.stdout and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no private disk here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    cache, half_made, temporary, left, after = done.stdout.splitlines()
    assert "No space left on device" in cache and "LABKIT_CACHE can name another folder" in cache
    assert "No space left on device" in temporary and "TMPDIR can name another folder" in temporary
    assert (half_made, left, after) == ("[]", "[]", "[0, 1]")


def test_a_rank_that_never_comes_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept from the place where ranks meet; the others are there, and wait."""
    monkeypatch.setattr(local, "main", never_comes_up)
    began = time.monotonic()
    with pytest.raises(
        RankError, match=r"not all ranks up after 2 s:(.|\n)*rank 1 was computing \(before any operation"
    ):
        RankGroup(len, 2, start_timeout=2)
    assert time.monotonic() - began < 5 and not ranks_alive()


def test_a_rank_that_is_killed_before_it_has_begun_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "main", killed_at_once)
    with pytest.raises(RankError, match="rank 1 of 2 was killed by SIGKILL"):
        RankGroup(len, 2, start_timeout=20)


def test_a_death_is_told_also_where_the_server_that_ranks_are_forked_from_is_held_up() -> None:
    """Its exit status comes from there, late or never."""
    with RankGroup(lambda comm, channel: channel.receive(), 2, hang_timeout=10) as group:
        server = psutil.Process(group.pids[0]).parent()
        assert server
        began = time.monotonic()
        server.suspend()
        try:
            os.kill(group.pids[1], signal.SIGKILL)
            with pytest.raises(RankError, match="rank 1 of 2 was killed by SIGKILL"):
                group.receive()
            assert time.monotonic() - began < 5
        finally:
            server.resume()
    assert local.run(lambda comm: comm.rank, 2) == [0, 1]
    assert not ranks_alive()


def killed_at_once(rank: int, job: Any, links: list[Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else rank_main(rank, job, links)


def never_comes_up(rank: int, job: Any, links: list[Any]) -> None:
    time.sleep(1000) if rank == 1 else rank_main(rank, job, links)
