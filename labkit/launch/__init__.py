"""Starting ranks, watching them, and ending them together: on this machine (`local`), on a Ray cluster (`ray`), or in place
where torchrun has started them (`rank`), on one host or several (`cluster`)."""

import multiprocessing
import os
from multiprocessing import forkserver

PRELOAD = ["labkit.launch.rank", "labkit.engine.llm"]  # what ranks find imported; nothing here may touch CUDA


def in_torchrun() -> bool:
    """Whether this process is a rank that torchrun (or the like) has started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def prepare() -> None:
    """Starts the server that ranks are forked from, if it isn't running, and doesn't wait: it takes seconds to import torch.

    So who will start ranks calls this before importing torch itself.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
