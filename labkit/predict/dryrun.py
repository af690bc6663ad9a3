"""Dry run: the engine itself on devices that are not there, for the bytes and operations of any layout of any shape.

`Engine`, `Decoder`, `Mesh` and `Comm` are those of a real run, with its scheduler and its sampling. Tensors are PyTorch's fake
ones, which have a shape and a device and no numbers, and the process group is its fake one, which sends nothing. So nothing
here computes a size: it is counted where a real run counts it. What depends on numbers is assumed: which experts the routers
pick (`Routing`), and that nothing ends before its last token.

Ranks that hold and do the same are run once. Each dry run has a process of its own, since the default process group of a
process can be neither fake and real nor changed while in use.
"""

import multiprocessing
import shutil
import signal
import subprocess
import tempfile
import traceback
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit import split
from labkit.comm import Comm, Pending
from labkit.engine.core import BLOCK, DTYPES, Engine, EngineOptions, Plan
from labkit.engine.report import assemble
from labkit.engine.requests import Request, SamplingParams
from labkit.launch.local import fork
from labkit.mesh import AXES, Layout, Mesh
from labkit.model import attention
from labkit.model.checkpoint import Piece, Weights
from labkit.model.config import ModelConfig, MoEConfig
from labkit.model.decoder import check_layout
from labkit.model.find import Model
from labkit.model.gguf_import import cache_root
from labkit.parallel.expert import EXCHANGES, MoE, Spread
from labkit.predict.shape import config_of

# A CPU build of torch lets fake tensors be on "cuda" once this does nothing for it.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""


@dataclass(frozen=True)
class Routing:
    """Which experts the routers pick.

    loads: by layer, how many tokens ask for each expert (a report's `experts`): tokens are drawn with these odds; layers that
    are not named share the load evenly. table: by layer, an array (requests, positions, experts per token) of what was
    measured, which goes before.
    """

    loads: Mapping[int, Sequence[float]] = field(default_factory=dict)
    table: Mapping[int, np.ndarray] = field(default_factory=dict)

    def pick(self, layer: int, moe: MoEConfig, tokens: Sequence[tuple[int, int]]) -> np.ndarray:
        """Experts (N, k) of N tokens, each given as (request, position)."""
        if layer in self.table:
            requests, positions = zip(*tokens, strict=True) if tokens else ((), ())
            return self.table[layer][list(requests), list(positions)]
        return _dealt(layer, moe.experts, moe.per_token, len(tokens), tuple(self.loads.get(layer, ())))


@cache
def _dealt(seed: int, experts: int, k: int, tokens: int, loads: tuple[float, ...]) -> np.ndarray:
    """Experts (tokens, k), k different ones each: drawn with odds `loads`, or dealt from shuffled decks, so that all are asked
    for equally often (to within a deck)."""
    rng = np.random.default_rng(seed)
    if loads:
        # The k smallest of exponential waiting times (Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003).
        return np.argsort(rng.exponential(size=(tokens, experts)) / np.maximum(loads, 1e-9), axis=1)[:, :k]
    hands = experts // k
    decks = rng.permuted(np.tile(np.arange(experts), (-(-tokens // hands), 1)), axis=1)
    return decks[:, : hands * k].reshape(-1, k)[:tokens]


def dryrun(
    model: str, *, tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False, batch: int = 1, context: int = 2048,
    dtype: str = "auto", device: str = "cuda", step: int = 4096, exchange: str = "all_to_all",
    placement: str | Mapping[int, Sequence[Sequence[int]]] = "contiguous", routing: Routing | None = None,
    rank_order: str = "dp-pp-tp", ranks_per_host: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What each rank would hold and send: `batch` sequences in all, each until it is `context` tokens long.

    Prefill is that of as many of the prompts as fill one step of `step` tokens, at least one; decode is one step of each
    sequence, at its full length. Figures per token are then those of all.

    Args:
        model: as for `LLM`, a registered shape, or a config.json. Weights are not read.
        device: of the fake tensors, "cuda" or "cpu". Where "cuda" can't be had, for want of a C++ compiler, it is "cpu".
        exchange, placement: of experts, as for `LLM`. routing: which experts are picked (default: all equally often).
        rank_order: as for `LLM`. ranks_per_host: so many successive ranks are on one host (default: all).

    Returns `layout`, `device`, `dtype`, `batch`, `context`; `ranks`: of each its `weights_bytes`, `kv_bytes`, `peak_bytes` (the
    most that was alive at once while it served, activations included), `wire_bytes_per_token` of each phase,
    `calls_per_token` of each phase and axis; `comm`, `hosts` and `between_hosts_bytes_per_token`: a report's
    (`labkit.engine.report`) without times; `experts`, for models that have some.
    Raises ModelError and LayoutError as `LLM` does.
    """
    config = config_of(model)
    layout = Layout(tp=tp, pp=pp, dp=dp, expert_parallel=ep, order=rank_order)
    if ranks_per_host is not None and ranks_per_host < 1:
        raise ValueError(f"ranks_per_host={ranks_per_host}: use 1 or more")
    hosts = [str(rank // (ranks_per_host or layout.world)) for rank in range(layout.world)]
    spread = Spread(exchange, placement)
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r}: use {', '.join(EXCHANGES)}")
    if ep and not config.moe:
        raise ValueError(f"ep=True: {model} has no experts to spread")
    if batch < 1 or not 2 <= context <= config.max_positions:
        raise ValueError(
            f"batch={batch}, context={context}: use 1 or more, and 2 to {config.max_positions}, the model's longest"
        )
    check_layout(config, layout, spread)
    dtype = config.dtype if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported: use 'auto', {', '.join(map(repr, DTYPES))}")
    options = EngineOptions(dtype, context, -(-batch // dp), step, seed=0, spread=spread, enforce_eager=True)
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r}: use 'cuda' or 'cpu'")
    library = guard() if device == "cuda" else None
    lacking = device == "cuda" and library is None and not torch.version.cuda
    job = _Job(Model(model, config, None), layout, options, batch, "cpu" if lacking else device, library, hosts)
    kinds = [_kind(config, layout, rank, batch, hosts) for rank in range(layout.world)]
    reports = _in_a_process(job, routing or Routing(), sorted({kinds.index(kind) for kind in kinds}))
    ranks = [
        reports[kinds.index(kind)] | {"rank": rank, "place": place, "stage": place["pp"], "host": int(hosts[rank])}
        for rank, kind in enumerate(kinds)
        for place in [layout.place(rank)]
    ]
    report = assemble(layout, options, 0, ranks, [])
    fields = ("rank", "stage", "place", "layers", "weights_bytes", "bytes_read", "kv_bytes", "peak_bytes")
    wires = [{phase: wire_bytes_per_token(rank, phase) for phase in ("prefill", "decode")} for rank in ranks]
    return {
        "model": model,
        "layout": layout.as_dict(),
        "device": f"fake {job.device}" + lacking * ", since no C++ compiler is here to make fake cuda possible",
        "dtype": dtype,
        "batch": batch,
        "context": context,
        "ranks": [
            {name: rank[name] for name in fields} | {"wire_bytes_per_token": wire, "calls_per_token": _calls(rank)}
            for rank, wire in zip(ranks, wires, strict=True)
        ],
        "comm": [
            {name: value for name, value in row.items() if "ms_per" not in name}
            for phase in ("prefill", "decode")
            for row in report["comm"]
            if row["phase"] == phase
        ],
        "experts": report["experts"],
        "hosts": report["hosts"],
        "between_hosts_bytes_per_token": report["between_hosts_bytes_per_token"],
    }


def wire_bytes_per_token(rank: Mapping[str, Any], phase: str) -> float:
    """Bytes that a rank (`Engine.report`) sends for each token of its replica."""
    return sum(entry["wire_bytes"] / max(entry["tokens"], 1) for entry in rank["comm"] if entry["phase"] == phase)


def _calls(rank: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Operations for each token, by phase and axis."""
    calls: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
    for entry in rank["comm"]:
        axes = calls[entry["phase"]]
        axes[entry["axis"]] = axes.get(entry["axis"], 0.0) + entry["calls"] / max(entry["tokens"], 1)
    return calls


def guard() -> Path | None:
    """The compiled guard that fake "cuda" tensors need on a CPU build of torch, built once and kept in the cache; None where
    it is not needed or can't be had."""
    if torch.version.cuda:
        return None
    library = cache_root() / f"fake_cuda-{torch.__version__}.so"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if library.exists() or compiler is None:
        return library if library.exists() else None
    root = Path(torch.__file__).parent
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, built = Path(folder) / "guard.cpp", Path(folder) / library.name
            source.write_text(_GUARD)
            command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{root}/include", str(source), "-o", str(built)]
            subprocess.run([*command, f"-L{root}/lib", "-lc10"], check=True, capture_output=True)
            built.replace(library)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


# -- in the process of its own --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    model: Model
    layout: Layout
    options: EngineOptions
    batch: int
    device: str
    guard: Path | None
    hosts: list[str]


def _in_a_process(job: _Job, routing: Routing, ranks: list[int]) -> dict[int, dict[str, Any]]:
    """The reports of `ranks`. Raises RuntimeError with the traceback where there is one of these instead."""
    here, there = multiprocessing.Pipe(duplex=False)
    [process] = fork(_answer, (there, job, routing, ranks)).processes
    there.close()
    try:
        with here:
            found: dict[int, dict[str, Any]] | str = here.recv()
    except EOFError:
        process.join()
        found = f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise RuntimeError(f"dry run of {job.model.name}: {found}")
    return found


def _kind(cfg: ModelConfig, layout: Layout, rank: int, batch: int, hosts: list[str]) -> tuple[Any, ...]:
    """Equal for ranks that hold and do the same."""
    place = layout.place(rank)
    requests = len(split.even(batch, layout.dp)[place["dp"]])
    if layout.ep > 1:  # which rows come depends on the routers
        return (rank,)
    share = split.heads(cfg.heads, cfg.kv_heads, layout.tp)[place["tp"]]
    # A stage between the first and the last has layers and a part of the head alone, and dense ones are all alike.
    between = 0 < place["pp"] < layout.pp - 1 and not cfg.moe
    stage = len(split.layers(cfg.layers, layout.pp)[place["pp"]]) if between else -place["pp"]
    head = len(split.vocabulary(cfg.vocab, layout.tp, layout.pp)[place["tp"]][place["pp"]])
    widths = (cfg.intermediate, 0 if place["pp"] else cfg.vocab, cfg.moe.width if cfg.moe else 0)
    parts = (head, *(len(split.even(width, layout.tp)[place["tp"]]) for width in widths))
    heads = (len(share.query), len(share.kv), share.pad_left, share.pad_right)
    crossings = (layout.crosses(rank, axis, hosts) for axis in (*AXES, "replica", "world"))
    return (stage, requests, heads, *parts, *crossings)


class _Unread(Weights):
    """Weights that are not there: tensors of the right shape and dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.bytes_read = dtype, 0

    def read(self, piece: Piece) -> torch.Tensor:
        part = torch.empty(piece.sliced_shape, dtype=self.dtype)
        self.bytes_read += part.nbytes
        return part


_WHOLE: set[Any] = set()  # operations that are not made of others


class Allocated(TorchDispatchMode):
    """Bytes of tensors on `device` that are alive, and the most there have been: each storage counts from the operation that
    makes it until nobody has it any more, in blocks of 512 bytes like those of CUDA's allocator. (PyTorch's own MemTracker is
    for training: it wants parameters with gradients.)"""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.alive, self.now, self.peak = device, set[int](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # x.device, asked of a fake tensor
            return func(*args, **kwargs)
        result = self._stand_in(func, args, kwargs)
        if result is None and func not in _WHOLE:
            with self:  # inference mode hands over composite operations whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            _WHOLE.add(func)
            result = None
        if result is None:
            result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type == self.device:
                storage = x.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    size = -(-storage.nbytes() // 512) * 512
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, size)
        return result

    def _stand_in(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        """The result of an operation for which fake tensors do what no device does; None for all others."""
        if func is torch.ops.aten.scaled_dot_product_attention.default and self.device == "cuda":
            # Where there is no GPU to ask, PyTorch writes out all scores. On one it does so for a mask over grouped heads alone.
            query, _, value, *mask = args
            masked = kwargs.get("attn_mask") is not None or any(m is not None for m in mask[:1])
            if not (masked and kwargs.get("enable_gqa")):
                return query.new_empty(*query.shape[:-1], value.shape[-1])
        if func is torch.ops.aten.rms_norm.default and self.device == "cuda":  # one kernel there
            return args[0].new_empty(args[0].shape)
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return args[0].new_empty(len(args[0]), args[1].shape[-1])  # a fake one refuses what a CPU's real one takes
        return None

    def _gone(self, storage: int, size: int) -> None:
        self.alive.remove(storage)
        self.now -= size


class _Shape(Model):
    """A model of which only the config is there."""

    def weights(self, seed: int) -> Weights:
        return _Unread(DTYPES.get(self.config.dtype, torch.float32))


class _DryEngine(Engine):
    """An engine that answers for itself where a real one looks at numbers."""

    def __init__(self, model: Model, comm: Comm, options: EngineOptions, routing: Routing) -> None:
        super().__init__(model, comm, options)
        self.routing = routing
        self.tokens: dict[int, list[tuple[int, int]]] = {}  # of each replica in this step: request and position
        # By layer: of this rank's tokens, how many asked for each expert.
        self.picked = {n: np.zeros(moe.moe.experts, int) for n, moe in self.decoder.moes.items()}
        for moe in self.decoder.moes.values():
            moe.look = partial(self._rows, moe)

    def _blocks(self) -> int:
        return -(-self.options.max_model_len // BLOCK) * self.options.max_num_seqs

    def _look(self, x: torch.Tensor) -> list[Any]:
        zeros: list[Any] = np.zeros(x.shape, int).tolist()
        return zeros

    def _forward(self, plan: Plan, hidden: Pending | None) -> torch.Tensor:
        self.tokens = {replica: [] for replica in self.followed}
        for replica, step in plan.items():
            for request, start, tokens in zip(step.requests, step.starts, step.tokens, strict=True):
                self.tokens[replica] += [(request.index, start + i) for i in range(len(tokens))]
        return super()._forward(plan, hidden)

    def _rows(self, moe: MoE, counted: torch.Tensor) -> list[int]:
        """What a real run finds in `counted`: rows from each rank to each (of an all-to-all only), then rows of each expert
        here."""
        experts = self.routing.pick(moe.number, moe.moe, [token for each in self.tokens.values() for token in each])
        parts = np.split(experts, np.cumsum(moe.sizes([len(each) for each in self.tokens.values()]))[:-1])
        own = parts[moe.mesh.index("ep" if moe.ranks > 1 else "tp")]
        size = moe.moe.experts
        self.picked[moe.number] += np.bincount(own.flatten(), minlength=size)
        rows: list[int] = np.bincount(experts.flatten(), minlength=size)[moe.experts.held].tolist()
        if len(counted) == len(rows):
            return rows
        owner = np.zeros(size, int)
        for rank, held in enumerate(moe.placement):
            owner[held] = rank
        return [int((owner[part] == rank).any(1).sum()) for part in parts for rank in range(moe.ranks)] + rows

    def report(self) -> dict[str, Any]:
        report = super().report()
        for each in report["experts"]:
            each["tokens"] = self.picked[each["layer"]].tolist()
        return report


def _run_rank(job: _Job, routing: Routing, rank: int) -> dict[str, Any]:
    """The report of one rank: its prefill, and its decode."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layout, options = job.layout, job.options
    longest = options.max_model_len
    prompt, params = [0] * (longest - 1), SamplingParams(temperature=0.0)
    filling = min(job.batch, layout.dp * max(1, options.max_num_batched_tokens // len(prompt)))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        with FakeTensorMode(), torch.inference_mode(), Allocated(job.device) as allocated:
            comm = Comm(Mesh(layout, torch.device(job.device), hosts=job.hosts), timed=False)
            engine = _DryEngine(_Shape(job.model.name, job.model.config, None), comm, options, routing)
            allocated.peak = allocated.now  # loading has other peaks, on the host
            for _ in engine.generate([Request(i, prompt, params, 0, frozenset(), 1) for i in range(filling)]):
                pass
            prefill = engine.report()
            # Their prompts are in the cache, but for the last token: one step for this, then one that is decode alone.
            requests = [
                Request(i, prompt, params, 0, frozenset(), 2, computed=len(prompt) - 1) for i in range(job.batch)
            ]
            for _ in engine.generate(requests):
                pass
            decode = engine.report()
    finally:
        dist.destroy_process_group()
    comm_of = {"prefill": prefill, "decode": decode}
    entries = [entry for phase, report in comm_of.items() for entry in report["comm"] if entry["phase"] == phase]
    return prefill | {"comm": entries, "peak_bytes": allocated.peak}


def _answer(_: int, to: Connection, job: _Job, routing: Routing, ranks: list[int]) -> None:
    """Sends the reports of `ranks`, or a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who waits for this, and ends it
    if job.guard:
        torch.ops.load_library(job.guard)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # a broadcast asks
    # Numpy's memory is real.
    attention._zeros = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)
    try:
        to.send({rank: _run_rank(job, routing, rank) for rank in ranks})
    except Exception:
        to.send(traceback.format_exc())
