"""Ranks on a real Ray cluster of two nodes, here: same results, errors that name a rank, and nothing left behind."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import labkit
from labkit import LLM, Layout, SamplingParams, run
from labkit.comm import Comm
from labkit.launch.local import RankError, launchers
from labkit.shm import library

ray = pytest.importorskip("ray", reason="Ray isn't installed: pip install labkit[ray]")
SMALL = {"num_cpus": 2, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes of two CPUs each, with addresses of their own on the loopback interface; gives their folder."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: it holds sockets
    head = {"node_ip_address": "127.0.0.2", "include_dashboard": False, **SMALL}
    packages = {"py_modules": [labkit]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("TMPDIR", folder)
        patch.delenv("PYTHONPATH", raising=False)
        nodes = Cluster(initialize_head=True, head_node_args=head)
        nodes.add_node(node_ip_address="127.0.0.3", **SMALL)
    try:
        ray.init(nodes.address, _node_ip_address="127.0.0.2", log_to_driver=False, runtime_env=packages)
        yield folder
    finally:
        ray.shutdown()
        nodes.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    deadline = time.monotonic() + 10
    while left := processes(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def processes(folder: str) -> list[list[str]]:
    """Command lines of all that the cluster has started: they inherit its TMPDIR."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if process.environ().get("TMPDIR") == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not [command for command in processes(cluster) if "_Actor" in " ".join(command)]
    assert wait_for_cpus()
    assert not [*tmp_path.glob("labkit-*"), *Path(cluster).glob("labkit-*")]


def wait_for_cpus(seconds: float = 10.0) -> bool:
    """Ray counts what is free a moment late."""
    deadline = time.monotonic() + seconds
    while ray.available_resources().get("CPU", 0) != 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    return ray.available_resources().get("CPU", 0) == 4


def where(comm: Comm) -> tuple[str, bool, int, float]:
    """The node; whether a copy of labkit came to it; threads; a sum over the ranks."""
    packages = [path for path in sys.path if "_ray_pkg" in path and os.path.exists(os.path.join(path, "labkit"))]
    node = ray.util.get_node_ip_address()
    return node, bool(packages), torch.get_num_threads(), comm.all_reduce(torch.ones(1)).item()


def test_groups_are_packed_on_nodes_and_labkit_travels_along() -> None:
    seen = run(where, layout=Layout(tp=2, pp=2), launcher="ray")
    nodes = [node for node, *_ in seen]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert {tuple(rest) for _, *rest in seen} == {(True, 1, 4.0)}


def test_stages_are_spread_and_output_and_closures_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    factor = 10

    def talk(comm: Comm, add: int) -> tuple[str, torch.Tensor]:
        print(f"hello from {comm.rank}")
        print("trouble", file=sys.stderr)
        return ray.util.get_node_ip_address(), comm.all_reduce(torch.ones(2)) * factor + add

    (first, x), (second, y) = run(talk, layout=Layout(pp=2), args=(5,), launcher="ray")
    assert first != second
    assert torch.equal(x, torch.full((2,), 25.0)) and torch.equal(x, y)
    seen = capsys.readouterr()
    assert sorted(seen.out.splitlines()) == ["[rank 0] hello from 0", "[rank 1] hello from 1"]
    assert sorted(seen.err.splitlines()) == ["[rank 0] trouble", "[rank 1] trouble"]


@pytest.mark.slow
def test_llm_gives_the_same_tokens() -> None:
    prompts, params = ["The tide", "One two three"], SamplingParams(temperature=0.0, max_tokens=8)
    with LLM("smollm2-135m", dtype="float32") as llm:
        alone = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with LLM(
        "smollm2-135m", dtype="float32", tensor_parallel_size=2, pipeline_parallel_size=2,
        distributed_executor_backend="ray",
    ) as llm:  # fmt: skip
        for _ in range(2):
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == alone
        report = llm.report()
    assert report["hosts"] == 1 and report["threads_per_rank"] == 1  # both nodes are this machine
    assert all(bool(rank["shared_memory"]) == bool(library()) for rank in report["ranks"])


def dies(comm: Comm) -> None:
    for i in range(10_000):
        if comm.rank == 1 and i == 2000:
            time.sleep(0.6)  # until the launcher has been told
            os.kill(os.getpid(), signal.SIGKILL)
        comm.all_reduce(torch.ones(2), "tp", "attention")


def raises(comm: Comm) -> None:
    if comm.rank == 1:
        raise ValueError("the one cause")
    comm.all_reduce(torch.ones(2))


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (raises, r"rank 1 of 2 raised ValueError: the one cause(.|\n)*in raises: raise ValueError"),
        (dies, r"rank 1 of 2 died on its Ray node \(.*\) while it was computing \(its last operation was number 2000"),
    ],
)
def test_the_rank_that_failed_is_named(fn: object, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=said) as caught:
        run(fn, 2, launcher="ray")  # type: ignore[arg-type]
    assert time.monotonic() - began < 30
    assert caught.value.rank == 1


def spins(comm: Comm) -> None:
    while comm.rank == 1:
        pass


def test_an_endless_loop_ends_at_the_timeout_and_is_located() -> None:
    with pytest.raises(RankError, match=r"not finished after 2 s:\n  rank 1 was computing(.|\n)*in spins"):
        run(spins, 2, timeout=2, launcher="ray")


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(RankError, match=r"Ray has no room for 5 x {'CPU': 1.0} on 2 nodes within 2 s"):
        launchers("ray")(lambda comm, channel: None, 5, start_timeout=2)
    with pytest.raises(ValueError, match="link='1gbit' on Ray: links are emulated between local CPU ranks only"):
        run(where, 2, link="1gbit", launcher="ray")
    with pytest.raises(ValueError, match="launcher='slurm': use 'local' or 'ray'"):
        run(where, 2, launcher="slurm")
    with pytest.raises(ValueError, match="distributed_executor_backend='uni': use 'mp', 'ray'"):
        LLM("random:smollm2-135m", distributed_executor_backend="uni")
