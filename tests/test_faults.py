"""A table of faults. Each strikes a rank of a running engine, and ends in one clear error, in time, with nothing left behind."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
from test_batching import llm_of, model
from test_launch import ranks_alive

from labkit import LLM, SamplingParams
from labkit.engine import llm as llm_module
from labkit.launch.local import RankError
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
    (faults.disagreeing, {"pp": 2}, {}, "for each other for . s:(.|\n)*broadcast of ids(.|\n)*all_gather of another"),
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
