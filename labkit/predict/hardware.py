"""GPUs and the links between them: datasheet figures (hardware.csv), and how long an exchange takes on them (collectives.csv).

Links are per direction: NVLink's 900 GB/s are 450 each way. GB = 1e9 bytes. Every row names its source.

An exchange's time comes from a measured table of the same hardware, operation and number of ranks, between sizes by log-log
interpolation. Hardware without tables borrows those of similar hardware (`like`): latencies stay, and where bandwidth counts, a
message takes as long there as one that is smaller by the ratio of the links takes here. Between nodes three stages are added up:
inside the nodes, between them, inside again.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LINKS = ("switch", "mesh", "pcie")
# Engines, and whose all-reduce each uses among the GPUs of a node. TensorRT-LLM's and gpt-fast's have no tables of their own:
# both are one- and two-shot kernels, as the ones named here.
ALL_REDUCE = {
    "typical": "vllm",
    "vllm": "vllm",
    "sglang": "sglang",
    "tensorrt-llm": "sglang",
    "gpt-fast": "vllm",
    "nccl": "nccl",
}
# Seconds that a message needs from node to node besides its bytes: what DeepEP's small dispatch takes longer over 16 GPUs on
# two nodes than over 8 on one (collectives.csv: 22.6 and 14.5 us), and half as much again for a handshake of NCCL's.
INTERNODE_SECONDS = 12e-6


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator, in nodes of `node_gpus` that share fast links.

    link: "switch" (`link_gbs` to any one peer or all together), "mesh" (to each peer), "pcie". attained: the part of the peak
    rates that a large matrix product reaches. like: whose tables of collectives to use.
    """

    name: str
    memory_gb: float
    bandwidth_gbs: float
    bf16_tflops: float
    fp8_tflops: float = 0.0
    attained: float = 0.8
    link: str = "switch"
    link_gbs: float = 450.0
    node_gpus: int = 8
    internode_gbs: float = 25.0
    like: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("memory_gb", "bandwidth_gbs", "bf16_tflops", "attained", "link_gbs", "node_gpus", "internode_gbs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"hardware {self.name}: {name}={getattr(self, name)!r}; a number above 0 is needed")
        if self.link not in LINKS:
            raise ValueError(f"hardware {self.name}: link={self.link!r}; use {', '.join(LINKS)}")

    def tflops(self, dtype: str) -> float:
        """Peak dense rate of matrix products; weights in int8 and int4 are multiplied in 16 bits."""
        return (
            self.bf16_tflops / 2
            if dtype == "float32"
            else self.fp8_tflops or self.bf16_tflops
            if dtype == "fp8"
            else self.bf16_tflops
        )

    def link_to(self, ranks: int) -> float:
        """GB/s per direction that a rank has to the others of a group of `ranks` inside a node."""
        return self.link_gbs * (ranks - 1) if self.link == "mesh" else self.link_gbs

    @property
    def tables(self) -> str:
        """Whose tables of collectives hold for it."""
        return self.like or {"pcie": "rtx-pro-6000"}.get(self.link, "h100-sxm")


@cache
def table() -> dict[str, Hardware]:
    """The hardware of hardware.csv, by name."""
    with (HERE / "hardware.csv").open(encoding="utf-8") as file:
        return {row["name"]: _hardware({k: v for k, v in row.items() if v}) for row in csv.DictReader(file)}


def hardware(spec: str) -> Hardware:
    """Hardware by its name in the table, from a JSON file with the fields of `Hardware`, or one of these with values changed or
    given, as "h100-sxm,link_gbs=100" or "memory_gb=96,bandwidth_gbs=4000,bf16_tflops=148". Raises ValueError."""
    first, *changes = (part.strip() for part in spec.split(","))
    known = table()
    values: dict[str, Any]
    if "=" in first:
        changes, values = [first, *changes], {"name": spec, "source": "given"}
    elif first.endswith(".json"):
        values = {"name": Path(first).stem, "source": first} | json.loads(Path(first).read_text(encoding="utf-8"))
    elif first.lower() in known:
        values = {f.name: getattr(known[first.lower()], f.name) for f in fields(Hardware)}
    else:
        raise ValueError(
            f"no hardware {first!r}: use {', '.join(known)}, a .json file, or values like memory_gb=80,bandwidth_gbs=3350,"
            "bf16_tflops=989,link_gbs=450"
        )
    for change in changes:
        name, _, value = change.partition("=")
        values[name.strip()] = value.strip()
    if changes and values["name"] != spec:
        values |= {"name": spec, "source": f"{values['source']}; {', '.join(changes)} as given"}
    return _hardware(values)


def _hardware(values: Mapping[str, Any]) -> Hardware:
    names: dict[str, Any] = {f.name: f.type for f in fields(Hardware)}
    if wrong := set(values) - set(names):
        raise ValueError(
            f"hardware {values.get('name')}: no field {', '.join(sorted(wrong))}; there are {', '.join(names)}"
        )
    if lacking := {"memory_gb", "bandwidth_gbs", "bf16_tflops"} - set(values):
        raise ValueError(f"hardware {values['name']}: {', '.join(sorted(lacking))} is needed")
    try:
        return Hardware(**{k: v if names[k] is str else names[k](v) for k, v in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"hardware {values['name']}: {error}") from None


# -- exchanges ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """An exchange's time, and where that comes from."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Curve:
    """Measured times (seconds) over sizes (bytes, as nccl-tests counts them), of one hardware, operation and number of ranks."""

    sizes: tuple[float, ...]
    measured: tuple[float, ...]
    seconds: tuple[float, ...]  # as measured, less the noise
    source: str

    @classmethod
    def of(cls, sizes: Sequence[float], seconds: Sequence[float], source: str) -> "Curve":
        """From measured points. A smaller message can't take longer, since it could be filled up: what looks so is noise."""
        return cls(tuple(sizes), tuple(seconds), tuple(min(seconds[i:]) for i in range(len(seconds))), source)

    def at(self, size: float) -> float:
        """Seconds for `size` bytes: log-log interpolation; beyond the largest in proportion; below the smallest as that."""
        sizes, seconds = self.sizes, self.seconds
        if size <= sizes[0]:
            return seconds[0]
        if size >= sizes[-1]:
            return seconds[-1] * size / sizes[-1]
        i = next(i for i, s in enumerate(sizes) if s > size)
        part = math.log(size / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
        return seconds[i - 1] * (seconds[i] / seconds[i - 1]) ** part


Curves = dict[tuple[str, str, str], dict[int, Curve]]  # (hardware, operation, algorithm) -> ranks -> curve


@cache
def curves() -> Curves:
    """What collectives.csv has."""
    found: Curves = {}
    with (HERE / "collectives.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            sizes = [float(b) for b in row["bytes"].split()]
            seconds = [float(us) * 1e-6 for us in row["microseconds"].split()]
            key = row["hardware"], row["op"], row["algorithm"]
            found.setdefault(key, {})[int(row["ranks"])] = Curve.of(sizes, seconds, row["source"])
    return found


def in_node(hw: Hardware, op: str, algorithm: str, ranks: int, size: float, known: Curves | None = None) -> Timed:
    """An exchange of `size` bytes among `ranks` GPUs that share fast links.

    size: of the whole tensor for all_gather and reduce_scatter, of one rank's for the others, as nccl-tests counts.
    """
    known = curves() if known is None else known
    name = hw.tables
    by_ranks = known.get((name, op, algorithm)) or known.get((name, op, "nccl")) or known["h100-sxm", op, algorithm]
    used = name if (name, op, algorithm) in known or (name, op, "nccl") in known else "h100-sxm"
    scale = table()[used].link_to(ranks) / hw.link_to(ranks)
    seconds = _over_ranks(by_ranks, ranks, size * scale)
    borrowed = (
        ""
        if used == hw.name
        else f", as on {used}" + (f" with links {1 / scale:.2g} times as fast" if scale != 1 else "")
    )
    which = algorithm if (used, op, algorithm) in known else "nccl"
    return Timed(seconds, f"collectives.csv: {which} {op}, {ranks} ranks{borrowed}")


def _over_ranks(by_ranks: Mapping[int, Curve], ranks: int, size: float) -> float:
    """Between and beyond the measured numbers of ranks: a straight line through the two next to it, in logarithms."""
    if ranks in by_ranks:
        return by_ranks[ranks].at(size)
    measured = sorted(by_ranks)
    if len(measured) == 1:
        return by_ranks[measured[0]].at(size)
    high = next((i for i, n in enumerate(measured) if n > ranks), len(measured) - 1)
    low, high = measured[max(high - 1, 0)], measured[max(high, 1)]
    a, b = by_ranks[low].at(size), by_ranks[high].at(size)
    return a * (b / a) ** (math.log(ranks / low) / math.log(high / low))


def all_reduce(hw: Hardware, engine: str, ranks: int, payload: float) -> Timed:
    """`payload` bytes of each of `ranks` neighbouring GPUs, summed up; over as many nodes as it takes."""
    if ranks == 1:
        return Timed(0.0, "one rank")
    per_node = min(ranks, hw.node_gpus)
    nodes = -(-ranks // per_node)
    if nodes == 1:
        return in_node(hw, "all_reduce", ALL_REDUCE[engine], ranks, payload)
    inside = 0.0
    if per_node > 1:
        inside = sum(in_node(hw, op, "nccl", per_node, payload).seconds for op in ("reduce_scatter", "all_gather"))
    between = 2 * math.ceil(math.log2(nodes)) * INTERNODE_SECONDS
    between += 2 * (nodes - 1) / nodes * payload / per_node / (hw.internode_gbs * 1e9)
    return Timed(
        inside + between,
        f"over {nodes} nodes: reduce-scatter and all-gather inside (collectives.csv), a tree between at "
        f"{hw.internode_gbs:g} GB/s per GPU and {INTERNODE_SECONDS * 1e6:g} us a step",
    )


def gather(hw: Hardware, engine: str, ranks: int, payload: float) -> Timed:
    """`payload` bytes of each of `ranks` neighbouring GPUs, to all of them."""
    if ranks == 1:
        return Timed(0.0, "one rank")
    per_node = min(ranks, hw.node_gpus)
    nodes = -(-ranks // per_node)
    inside = in_node(hw, "all_gather", ALL_REDUCE[engine], per_node, payload * ranks)
    if nodes == 1:
        return inside
    between = math.ceil(math.log2(nodes)) * INTERNODE_SECONDS + payload * (nodes - 1) / (hw.internode_gbs * 1e9)
    return Timed(inside.seconds + between, f"{inside.source}; between {nodes} nodes at {hw.internode_gbs:g} GB/s")


def hop(hw: Hardware, payload: float, across_nodes: bool) -> Timed:
    """`payload` bytes from one GPU to another."""
    if across_nodes:
        seconds = INTERNODE_SECONDS + payload / (hw.internode_gbs * 1e9)
        return Timed(seconds, f"between nodes: {INTERNODE_SECONDS * 1e6:g} us and {hw.internode_gbs:g} GB/s")
    # Of an all-to-all over two, half of the tensor goes to the other.
    exchange = in_node(hw, "all_to_all", "nccl", 2, 2 * payload)
    return Timed(exchange.seconds, exchange.source.replace("all_to_all, 2 ranks", "all_to_all over 2, as a send"))


def expert_exchange(hw: Hardware, op: str, ranks: int, payload: float) -> Timed:
    """A "dispatch" or "combine" over `ranks` GPUs of `payload` bytes, those that a rank's tokens would be if each went to each
    of its experts separately (as DeepEP counts)."""
    if ranks == 1:
        return Timed(0.0, "one rank")
    by_ranks = curves()["h100-sxm", op, "deepep"]
    if ranks < min(by_ranks):
        return in_node(hw, "all_to_all", "nccl", ranks, payload)
    own = curves().get((hw.tables, op, "deepep"), {})
    link = hw.link_to(hw.node_gpus) if ranks <= hw.node_gpus else hw.internode_gbs
    theirs = table()["h100-sxm"]
    scale = (theirs.link_to(8) if ranks <= hw.node_gpus else theirs.internode_gbs) / link
    source = f"collectives.csv: DeepEP low-latency {op}, h100-sxm, up to {max(by_ranks)} ranks"
    return Timed(_over_ranks(own if ranks in own else by_ranks, ranks, payload * scale), source)
