"""The process grid: how many ranks along each axis, and where this one stands.

`Layout` is only numbers and may be made anywhere; `Mesh` belongs to one rank of an initialised process group. Ranks are
laid out as `arange(world).view(dp, pp, tp)`: tensor-parallel neighbours are adjacent (on one host, on its fast links, since
launchers number the ranks host by host), stages are further apart, replicas furthest. `Layout.order` can say otherwise.
Experts are spread over the ranks of a stage in all its replicas, dp x tp ("ep"); the ranks of one replica, pp x tp, are an
axis too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist

from labkit.split import LayoutError

AXES = ("dp", "pp", "tp")
ORDERS = tuple("-".join(axes) for axes in permutations(AXES))


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, pipeline and data parallelism; `world = dp * pp * tp` ranks.

    expert_parallel: whether the ranks of a stage, dp * tp of them, share out its experts (the axis "ep").
    order: of the axes in the ranks' numbers, that of neighbours last.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    expert_parallel: bool = False
    order: str = "dp-pp-tp"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise LayoutError(f"rank_order={self.order!r}: use {', '.join(ORDERS)}")
        for name, size in (("tensor", self.tp), ("pipeline", self.pp), ("data", self.dp)):
            if not isinstance(size, int) or size < 1:
                raise LayoutError(f"{name}_parallel_size={size!r}: use a whole number, 1 or more")

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def ep(self) -> int:
        return self.dp * self.tp if self.expert_parallel else 1

    def place(self, rank: int) -> dict[str, int]:
        """Coordinates of `rank`: {"dp": replica, "pp": stage, "tp": shard}."""
        sizes, place = {"dp": self.dp, "pp": self.pp, "tp": self.tp}, {}
        for axis in reversed(self.order.split("-")):
            rank, place[axis] = divmod(rank, sizes[axis])
        return {axis: place[axis] for axis in AXES}

    def peers(self, rank: int, axis: str) -> list[int]:
        """The global ranks along `axis` through `rank`, in order: the group that its collectives on that axis span."""
        if axis == "world":
            return list(range(self.world))
        here = self.place(rank)
        if axis == "replica":
            return [r for r in range(self.world) if self.place(r)["dp"] == here["dp"]]
        if axis == "ep":
            return (
                [r for r in range(self.world) if self.place(r)["pp"] == here["pp"]] if self.expert_parallel else [rank]
            )
        return [r for r in range(self.world) if {**self.place(r), axis: 0} == {**here, axis: 0}]

    def crosses(self, rank: int, axis: str, hosts: Sequence[str]) -> bool:
        """Whether the next rank along `axis`, to which `rank` sends in a ring and in a pipeline, is on another of `hosts` (one
        name for each rank)."""
        peers = self.peers(rank, axis)
        return hosts[peers[(peers.index(rank) + 1) % len(peers)]] != hosts[rank]

    def as_dict(self) -> dict[str, int]:
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp, "ep": self.ep}


def pick_backend(ranks_on_host: int) -> tuple[str, str]:
    """(backend, device type) for this host: nccl on a GPU each; gloo when ranks share GPUs or there are none."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        return "gloo", "cpu"
    return ("nccl", "cuda") if gpus >= ranks_on_host else ("gloo", "cuda")


def gather(value: Any) -> list[Any]:
    """`value` of every rank, pickled, in rank order. Collective: for starting up, before there is a `Comm` to count it."""
    out: list[Any] = [value] * dist.get_world_size()
    if len(out) > 1:
        dist.all_gather_object(out, value)
    return out


class Mesh:
    """This rank's place in the grid, its device, and one process group per axis.

    Args:
        layout: degrees; `layout.world` must equal the world size of the initialised default process group.
        device: the rank's own device.
        timeout: seconds after which a collective on any of the groups gives up.
        hosts: a name for the host of each rank, equal for those that share its memory (default: all on one).
        ranks_here: how many ranks share this one's machine, with its cores and GPUs (default: all).
    """

    def __init__(
        self, layout: Layout, device: torch.device, timeout: float = 60.0, hosts: Sequence[str] = (),
        ranks_here: int | None = None,
    ) -> None:  # fmt: skip
        if layout.world != dist.get_world_size():
            raise LayoutError(
                f"layout tp={layout.tp} x pp={layout.pp} x dp={layout.dp} needs {layout.world} ranks; "
                f"{dist.get_world_size()} were started"
            )
        self.layout = layout
        self.device, self.timeout = device, timeout
        self.hosts, self.ranks_here = hosts or [""] * layout.world, ranks_here or layout.world
        self.rank = dist.get_rank()
        self.world_size = layout.world
        self.backend: str = dist.get_backend()
        place = layout.place(self.rank)
        self.dp_rank, self.pp_rank, self.tp_rank = place["dp"], place["pp"], place["tp"]
        self._peers = {axis: layout.peers(self.rank, axis) for axis in (*AXES, "ep", "replica", "world")}
        self._groups: dict[str, dist.ProcessGroup | None] = {"world": dist.group.WORLD}
        # What goes from stage to stage has a group of its own ("pp_hops"): on the one of the stages' collectives, NCCL would
        # make them wait for each other.
        several = ("replica",) if layout.dp > 1 else ()
        self._groups["replica"] = dist.group.WORLD
        for name, axis in (*((axis, axis) for axis in (*AXES, "ep", *several)), ("pp_hops", "pp")):
            # Every rank takes part in making every group, in the same order, or new_group waits for ever.
            for peers in sorted({tuple(layout.peers(r, axis)) for r in range(layout.world)}):
                group = dist.new_group(list(peers), timeout=timedelta(seconds=timeout)) if len(peers) > 1 else None
                if self.rank in peers:
                    self._groups[name] = group

    def peers(self, axis: str) -> list[int]:
        """Global ranks of this rank's group along `axis` ("tp", "pp", "dp", "ep" or "world")."""
        if axis not in self._peers:
            raise ValueError(f"no axis {axis!r}: use one of {', '.join(self._peers)}")
        return self._peers[axis]

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group along `axis`; also "pp_hops", a second one along "pp". None for a group of this rank alone."""
        return self._groups[axis]

    def size(self, axis: str) -> int:
        return len(self.peers(axis))

    def on_one_host(self, axis: str) -> bool:
        """Whether all ranks of this rank's group along `axis` share a host."""
        return len({self.hosts[peer] for peer in self.peers(axis)}) == 1

    def index(self, axis: str) -> int:
        """This rank's position inside its group along `axis`."""
        return self.peers(axis).index(self.rank)


class Alone(Mesh):
    """The grid of one rank, with no process group and on no device: for a model that is only to be looked at."""

    def __init__(self) -> None:
        self.layout, self.device, self.backend = Layout(), torch.device("meta"), ""
        self.timeout = 0.0
        self.rank, self.world_size = 0, 1
        self.dp_rank = self.pp_rank = self.tp_rank = 0
        self._peers = {axis: [0] for axis in (*AXES, "ep", "replica", "world")}
        self._groups = dict.fromkeys(self._peers)
