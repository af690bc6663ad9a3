"""What every rank is doing, readable by the launcher when a rank no longer answers.

A small file mapped into the memory of both, one fixed slot per rank. Writing is one `pack_into`, under a microsecond, and
what was written outlives the rank. There is no lock: a reader may catch a slot half written, which costs a garbled word.
"""

import ctypes
import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_SLOT = struct.Struct("=qd?239s")  # operation number, time.monotonic(), waiting, what: 256 bytes


@dataclass(frozen=True)
class Doing:
    """What a rank wrote last: it entered (`waiting`) or left its operation `number` at `since` (time.monotonic(), seconds)."""

    number: int
    since: float
    waiting: bool
    text: str

    def describe(self, now: float) -> str:
        """In words, as seen at `now`; goes on from "rank 3"."""
        if self.waiting:
            number = f" (its operation {self.number})" if self.number else ""
            return f"waited {max(now - self.since, 0):.1f} s in {self.text}{number}"
        last = f"its last operation was number {self.number}, {self.text}" if self.number else "before any operation"
        return f"was computing ({last})"


class Board:
    """The mapped file. A rank writes its own slot (`labkit.comm.Board`); the launcher, which makes it, reads all."""

    def __init__(self, path: Path, ranks: int, rank: int = 0) -> None:
        with path.open("a+b") as file:
            # Makes it that long, or leaves it. Written, not only made long: in a hole, a full disk would show as SIGBUS.
            file.write(bytes(ranks * _SLOT.size - file.tell()))
            file.flush()
            self._map = mmap.mmap(file.fileno(), ranks * _SLOT.size)
        self._offset = rank * _SLOT.size
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map, self._offset))  # of the rank's slot, for C

    def write(self, number: int, waiting: bool, text: str) -> None:
        _SLOT.pack_into(self._map, self._offset, number, time.monotonic(), waiting, text.encode())

    def read(self) -> list[Doing]:
        """One for each rank."""
        slots = _SLOT.iter_unpack(self._map)
        return [Doing(n, at, waiting, raw.rstrip(b"\0").decode(errors="replace")) for n, at, waiting, raw in slots]

    def close(self) -> None:
        self._map.close()
