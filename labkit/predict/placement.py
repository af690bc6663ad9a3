"""What a layout costs when hosts part its tensor-parallel groups: counted by a dry run, timed on the ranks' own network.

Tensor parallelism waits for an exchange twice in each layer, a pipeline once between two stages. So the former belongs inside
a host, on its fast links, and the latter between hosts (Narayanan et al. 2021, arXiv 2104.04473, section 3.2).
"""

import time
import warnings
from statistics import median

import torch

from labkit.comm import Comm
from labkit.engine.core import DTYPES, Engine
from labkit.mesh import Layout
from labkit.predict.dryrun import dryrun

REPEATS = 10


class SplitGroupWarning(UserWarning):
    """A tensor-parallel group is on several hosts."""


def parted(layout: Layout, hosts: list[str]) -> list[list[int]]:
    """The tensor-parallel groups, as ranks, that are on several of `hosts` (one name for each rank)."""
    groups = sorted({tuple(layout.peers(rank, "tp")) for rank in range(layout.world)})
    return [list(group) for group in groups if len({hosts[rank] for rank in group}) > 1]


def warn_of_parted_groups(engine: Engine) -> None:
    """Warns on rank 0 if hosts part a tensor-parallel group, with what that costs each token. Collective: all ranks call it."""
    comm, layout = engine.comm, engine.comm.mesh.layout
    hosts = list(comm.mesh.hosts)
    if groups := parted(layout, hosts):
        row = torch.zeros(engine.model.config.hidden, dtype=DTYPES[engine.options.dtype], device=comm.device)
        took = comm.gather_objects(_all_reduce_seconds(comm, row) if comm.rank in groups[0] else 0.0)
        if comm.rank == 0:
            if comm.board is not None:
                comm.board.write(0, True, "a dry run, whose figures a warning needs")
            warnings.warn(_cost(engine, hosts, groups[0], row.nbytes, max(took)), SplitGroupWarning, stacklevel=2)
        comm.barrier()


def _cost(engine: Engine, hosts: list[str], group: list[int], size: int, seconds: float) -> str:
    """In words, of all-reduces of `size` bytes that take `seconds` each over `group`."""
    layout, options, each = engine.comm.mesh.layout, engine.options, max(map(hosts.count, hosts))
    dry = dryrun(
        engine.model.name, tp=layout.tp, pp=layout.pp, dp=layout.dp, ep=layout.expert_parallel, context=64,
        dtype=options.dtype, device="cpu", exchange=options.spread.exchange, rank_order=layout.order, ranks_per_host=each,
    )  # fmt: skip
    calls = (dry["ranks"][rank]["calls_per_token"]["decode"]["tp"] for rank in layout.peers(group[0], "pp"))
    waits = sum(calls) - (layout.pp - 1)  # one of each stage's is for logits, at the same time
    text = (
        f"tensor-parallel ranks {group} are on {len({hosts[rank] for rank in group})} hosts: each decoded token waits "
        f"{waits:.0f} times for an exchange of some {size:,} bytes between them, {seconds * 1e3:.3g} ms each as just measured, "
        f"{waits * seconds * 1e3:.3g} ms in all, and sends {dry['between_hosts_bytes_per_token']['decode']:,.0f} bytes from "
        "host to host; it waits for none with "
    )
    if each % layout.tp:
        return text + f"tensor_parallel_size={each}, the ranks of one host, and pipeline stages on the others"
    return text + "rank_order='dp-pp-tp', and as many ranks on each host"


def _all_reduce_seconds(comm: Comm, x: torch.Tensor) -> float:
    """The median time of an all-reduce of `x` over tensor-parallel ranks; not counted."""
    meter, comm.meter, took = comm.meter, False, []
    for _ in range(REPEATS + 1):  # the first one is slower
        began = time.perf_counter()
        comm.all_reduce(x, "tp").sum().item()  # on a GPU, waits for it
        took.append(time.perf_counter() - began)
    comm.meter = meter
    return median(took[1:])
