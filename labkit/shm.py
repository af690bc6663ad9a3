"""Shared memory between the ranks of one host: the way round gloo's sockets for small messages. `native/shm.c` does the work.

Between two ranks on a core each, an all-reduce of 2 KB takes some 5 us here and 300 us or more through gloo: `labkit bench
collectives` shows both over all sizes. The C file is compiled when labkit is installed, if there is a C compiler; without
it, off Linux, or between hosts, `join` finds none, and everything goes through gloo.
"""

import ctypes
import os
import secrets
from functools import cache

import torch

from labkit import native
from labkit.mesh import Mesh, gather

# How often to look at a flag before the core is given up, and then before sleeping.
CROWDED = 20, 1000  # more ranks than cores: the one that is waited for may need this core
ALONE = 16000, 0  # a core each: some 400 us; to sleep and wake takes longer than most waits
SLOT = 256 * 1024  # bytes of one message's chunk: two slots of each rank stay in a core's second-level cache
ONE_SHOT = 16 * 1024  # bytes up to which each rank adds up everything itself: one meeting instead of two
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64)  # order: shm.c
_OPS = {1: "all_reduce", 2: "all_gather", 3: "reduce_scatter", 4: "all_to_all", 5: "broadcast"}


class Sums(ctypes.Structure):
    """What C needs to add up with other ranks in the midst of its work (`Sums` of native/kernels.c), and what it has counted."""

    _fields_ = [
        ("all_reduce", ctypes.c_void_p), ("group", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("one_shot", ctypes.c_int64),
        ("number", ctypes.c_int64), ("seconds", ctypes.c_double * 2), ("doing", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled `shm.c`, or None where there is none. Calls release Python's lock."""
    found = native.load("_shm") if hasattr(os, "memfd_create") else None
    if found is None:
        return None
    p, i, n, d = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_double
    return native.declare(
        found,
        {
            "size": (n, (i, n)), "open": (p, (i, i, i, n, d, i, i)), "tag": (ctypes.c_uint64, (p, i)),
            "all_reduce": (i, (p, p, n, i, n)), "all_gather": (i, (p, p, p, n)),
            "reduce_scatter": (i, (p, p, p, n, i)), "all_to_all": (i, (p, p, p, p, p, ctypes.c_uint64)),
            "broadcast": (i, (p, p, n, i)),
        },
    )  # fmt: skip


def join(mesh: Mesh, timeout: float, *, alone: bool) -> "dict[str, SharedMemory]":
    """For each axis of `mesh` whose ranks all are on one of its hosts: their shared memory. Collective: every rank calls it
    once.

    Args:
        timeout: seconds that an operation may wait.
        alone: each rank has a core of its own.
    """
    lib = library()
    axes = [axis for axis in ("tp", "pp", "dp", "ep", "world") if mesh.size(axis) > 1]
    axes += ["replica"] if mesh.layout.dp > 1 and mesh.size("replica") > 1 else []
    owned: dict[str, tuple[int, bytes, str]] = {}  # fd, a secret that proves the file to be the right one, its path
    if lib:
        for axis in axes:
            if mesh.index(axis) == 0:  # a file without a name: it ends with the last process that holds it
                fd, token = os.memfd_create("labkit"), secrets.token_bytes(16)
                os.truncate(fd, lib.labkit_size(mesh.size(axis), _slot(mesh.size(axis))) + len(token))
                os.pwrite(fd, token, os.fstat(fd).st_size - len(token))
                owned[axis] = fd, token, f"/proc/{os.getpid()}/fd/{fd}"
    offers = gather((lib is not None, {axis: offer[1:] for axis, offer in owned.items()}))
    joined: dict[str, SharedMemory] = {}
    for axis in axes:
        peers = [offers[rank] for rank in mesh.peers(axis)]
        if mesh.on_one_host(axis) and all(able for able, _ in peers):
            memory = _open(mesh, axis, peers[0][1][axis], timeout, ALONE if alone else CROWDED)
            if memory:
                joined[axis] = memory
    able = gather(set(joined))  # if one of a group could not open it, none uses it
    for fd, _, _ in owned.values():
        os.close(fd)
    return {axis: m for axis, m in joined.items() if all(axis in able[rank] for rank in mesh.peers(axis))}


def _slot(n: int) -> int:
    return SLOT // (64 * n) * 64 * n


def _open(
    mesh: Mesh, axis: str, offer: tuple[bytes, str], timeout: float, looks: tuple[int, int]
) -> "SharedMemory | None":
    token, path = offer
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:  # another container's process, or one that may not be looked into
        return None
    try:
        if os.pread(fd, len(token), os.fstat(fd).st_size - len(token)) != token:
            return None
        lib = library()
        n, me = mesh.size(axis), mesh.index(axis)
        handle = lib and lib.labkit_open(fd, n, me, _slot(n), timeout, *looks)
        return SharedMemory(lib, handle, mesh.peers(axis), timeout) if lib and handle else None
    finally:
        os.close(fd)


class SharedMemory:
    """One group's shared memory. Tensors are contiguous, on the CPU, of a dtype in `DTYPES` where they are added up.

    Every method raises RuntimeError if a rank does not come in time, or is in another operation.
    """

    def __init__(self, lib: ctypes.CDLL, handle: int, peers: list[int], timeout: float) -> None:
        self._lib, self._handle, self._peers, self._timeout = lib, handle, peers, timeout
        self._sizes = ctypes.c_int64 * len(peers)

    def takes(self, op: str, x: torch.Tensor) -> bool:
        """Whether it does `op` ("all_reduce", ...) on `x`."""
        return op in _OPS.values() and (x.dtype in DTYPES or "reduce" not in op) and x.is_contiguous()

    def all_reduce(self, x: torch.Tensor, one_shot: int = ONE_SHOT) -> None:
        """Sum over the ranks, in place, added up in rank order (bfloat16 in float32)."""
        dtype = DTYPES.index(x.dtype)
        self.check(self._lib.labkit_all_reduce(self._handle, x.data_ptr(), x.numel(), dtype, one_shot))

    def sums(self, x: torch.Tensor, number: int, doing: int | None) -> Sums:
        """What `all_reduce` of tensors like `x` takes in C. number: of the last operation of this rank; doing: where the launcher
        looks (`Board.address`)."""
        function = ctypes.cast(self._lib.labkit_all_reduce, ctypes.c_void_p)
        return Sums(function, self._handle, DTYPES.index(x.dtype), ONE_SHOT, number, doing=doing)

    def all_gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """`out` (n, *x.shape): `x` of every rank."""
        self.check(self._lib.labkit_all_gather(self._handle, x.data_ptr(), out.data_ptr(), x.nbytes))

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """`out` (k, ...): this rank's rows of the sum of `x` (n * k, ...)."""
        dtype = DTYPES.index(x.dtype)
        self.check(self._lib.labkit_reduce_scatter(self._handle, x.data_ptr(), out.data_ptr(), out.numel(), dtype))

    def all_to_all(self, x: torch.Tensor, out: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> None:
        """Rows of `x` to the ranks, in order; `out`: what they send. Rows are equally long on all ranks."""
        row = x.nbytes // len(x) if len(x) else out.nbytes // max(len(out), 1)
        send, recv = (self._sizes(*(n * row for n in rows)) for rows in (send_rows, recv_rows))
        done = self._lib.labkit_all_to_all(self._handle, x.data_ptr(), out.data_ptr(), send, recv, x.element_size())
        self.check(done)

    def broadcast(self, x: torch.Tensor, source: int) -> None:
        """`x` of the `source`-th rank, in place."""
        self.check(self._lib.labkit_broadcast(self._handle, x.data_ptr(), x.nbytes, source))

    def check(self, code: int) -> None:
        """Raises if `code`, of an operation in C, isn't 0."""
        if code > 0:
            raise RuntimeError(f"Timed out waiting {self._timeout:g} s for rank {self._peers[code - 1]}")
        if code < 0:
            tag = self._lib.labkit_tag(self._handle, -code - 1)
            other = f"{_OPS.get(tag >> 56, 'nothing')} of {tag & 0xFFFFFFFFFFFF} bytes ({DTYPES[tag >> 48 & 0xFF]})"
            raise RuntimeError(f"rank {self._peers[-code - 1]} is in another operation: {other}")
