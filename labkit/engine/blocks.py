"""Blocks of KV cache: who has which, and which hold the beginning of a later request too (prefix caching).

A full block is known by its tokens and all tokens before it, compared one by one: no hash stands for them that two texts could
share. A request that begins alike shares it with those that have it, and computes only what comes behind. Blocks that nobody
has any more stay known until others need the room, those unused for longest first (as vLLM does it; SGLang keeps the same in a
tree, arXiv 2312.07104).

Nothing here depends on the rank: from the same requests in the same order come the same blocks.
"""

from collections.abc import Iterable, Sequence
from itertools import count


class BlockPool:
    """`blocks` cache blocks of `size` tokens. prefix_caching: full ones are remembered, else all are alike."""

    def __init__(self, blocks: int, size: int, prefix_caching: bool = False) -> None:
        self.blocks, self.size, self.prefix_caching = blocks, size, prefix_caching
        self.free = list(range(blocks))[::-1]  # hold nothing worth keeping
        self.kept: dict[int, None] = {}  # nobody's, but known; those unused for longest first
        self.users = [0] * blocks
        self._texts = count(1)
        # The number of all the text before a block (0: none), and its own tokens: the block, and the number of the text so far.
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}  # of each known block

    @property
    def room(self) -> int:
        """How many blocks can be had."""
        return len(self.free) + len(self.kept)

    def known(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Known blocks that hold the first of these tokens, but never the last, whose logits are wanted; the text's number."""
        found: list[int] = []
        text = 0
        for start in range(0, len(tokens) - self.size if self.prefix_caching else 0, self.size):
            block, number = self._known.get((text, tuple(tokens[start : start + self.size])), (None, 0))
            if block is None:
                break
            found.append(block)
            text = number
        return found, text

    def take(self, blocks: int, shared: Sequence[int] = ()) -> list[int] | None:
        """So many blocks, the known ones `shared` first; None if there is no room for all."""
        if blocks - len(shared) > self.room - sum(block in self.kept for block in shared):
            return None
        for block in shared:
            self.kept.pop(block, None)
        taken = [*shared, *(self._one() for _ in range(blocks - len(shared)))]
        for block in taken:
            self.users[block] += 1
        return taken

    def _one(self) -> int:
        if self.free:
            return self.free.pop()
        block = next(iter(self.kept))
        del self.kept[block], self._known[self._key.pop(block)]
        return block

    def learn(self, text: int, block: int, tokens: Sequence[int]) -> int:
        """A block, now full, holds `tokens` behind the text of this number. Returns the number of both. If another block holds
        the same already, that one stays the known one."""
        key = text, tuple(tokens)
        if key not in self._known:
            self._known[key] = block, next(self._texts)
            self._key[block] = key
        return self._known[key][1]

    def give_back(self, blocks: Iterable[int]) -> None:
        """A request's blocks, in order: the last of them is the first to be forgotten."""
        for block in reversed([*blocks]):
            self.users[block] -= 1
            if not self.users[block]:
                if block in self._key:
                    self.kept[block] = None
                else:
                    self.free.append(block)
