"""What each rank is doing, readable from outside: by the launcher, when a rank no longer answers.

One small memory-mapped file per run, a slot for each rank. Writing costs about a microsecond.
"""

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

SLOT = 256  # bytes for each rank
HEAD = struct.Struct("<Qd?H")  # operation number, time.monotonic(), waiting?, length of the text


@dataclass(frozen=True)
class Doing:
    """The last thing a rank wrote: operation `number`, entered (`waiting`) or left, `since` in time.monotonic() seconds."""

    number: int
    since: float
    waiting: bool
    text: str

    def __str__(self) -> str:
        if self.waiting:
            return f"waited {time.monotonic() - self.since:.1f} s in {self.text} (its operation {self.number})"
        if self.number:
            return f"was computing (its last operation was number {self.number}, {self.text})"
        return "was computing (it had not begun any operation)"


class Board:
    """A rank's own slot."""

    def __init__(self, path: Path, rank: int) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._at = rank * SLOT

    def write(self, number: int, waiting: bool, text: str) -> None:
        raw = text.encode()[: SLOT - HEAD.size]
        HEAD.pack_into(self._map, self._at, number, time.monotonic(), waiting, len(raw))
        start = self._at + HEAD.size
        self._map[start : start + len(raw)] = raw


def create(path: Path, ranks: int) -> None:
    path.write_bytes(bytes(SLOT * ranks))


def read(path: Path, ranks: int) -> list[Doing]:
    """What every rank wrote last."""
    raw = path.read_bytes()
    doings = []
    for rank in range(ranks):
        number, since, waiting, length = HEAD.unpack_from(raw, rank * SLOT)
        start = rank * SLOT + HEAD.size
        doings.append(Doing(number, since, waiting, raw[start : start + length].decode(errors="replace")))
    return doings
