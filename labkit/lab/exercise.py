"""What an exercise is: random cases, a reference, hints, and the wrong answers that people really give.

The reference is counted by the engine, or computed uncut; it isn't an answer key. A misconception is a small function that
makes the wrong answer, so that it can be told by name on any random case.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Answer = list[torch.Tensor]  # one per rank, float64


class PerRank(list[Any]):
    """An argument of which each rank is handed its own element; the reference gets them all."""


class Traffic(NamedTuple):
    """What was counted on one rank in one case: calls of each operation, and the bytes that this rank sent.

    overwritten: a tensor was changed after it was handed to `send`, before this rank's next `recv` had ended.
    """

    calls: Mapping[str, int]
    wire_bytes: int
    overwritten: bool = False


@dataclass(frozen=True)
class Case:
    """One call of the learner's function: its arguments (on ranks `comm` is added), in words, and on how many ranks."""

    args: tuple[Any, ...]
    text: str
    ranks: int = 1


@dataclass(frozen=True)
class Misconception:
    """ "That is what you get when `name`", why it is wrong, and the answer that it leads to."""

    name: str
    why: str
    answer: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One graded function.

    Args:
        call: how it is called, e.g. "per_gpu(model, tp)".
        cases: makes them from a random generator; the same seed makes the same cases.
        reference: from a case's arguments to the right answer. With `spmd` it and each misconception's `answer` also get the
            number of ranks, and return a list with one value per rank.
        misconceptions: the first that explains all answers is named.
        moral: said when it is passed.
        unit: what numbers are shown in, and how large that is.
        tolerance: relative to the largest right number.
        join: puts the values of all ranks into a form that doesn't depend on choices which the learner is free to make.
        rule: from a case, and what was counted on one rank, to what is wrong with the way to a right answer, if anything.
        gpus: with fewer on this machine, the exercise is "blocked".
    """

    name: str
    call: str
    cases: Callable[[random.Random], list[Case]]
    reference: Callable[..., Any]
    misconceptions: tuple[Misconception, ...]
    hints: tuple[str, ...]
    moral: str
    points: int = 1
    spmd: bool = False
    unit: tuple[str, float] = ("", 1.0)
    tolerance: float = 0.02
    join: Callable[[Answer], Answer] = lambda values: values
    rule: Callable[[Case, Traffic], str] = lambda case, traffic: ""
    gpus: int = 0

    def answers(self, make: Callable[..., Any], case: Case) -> Answer:
        """What `make` (the reference or a misconception's answer) gives for `case`, on each rank."""
        values = make(*case.args, case.ranks) if self.spmd else [make(*case.args)]
        return [torch.as_tensor(v, dtype=torch.float64) for v in values]

    def distance(self, a: Answer, b: Answer) -> float:
        """Largest difference, relative to the largest number of `b`; infinite if the shapes differ."""
        a, b = self.join(a), self.join(b)
        if [x.shape for x in a] != [y.shape for y in b]:
            return float("inf")
        pairs = zip(a, b, strict=True)
        return max(torch.nan_to_num((x - y) / _largest(y), nan=torch.inf).abs().max().item() for x, y in pairs)

    def diagnose(self, mine: list[Answer], cases: list[Case]) -> Misconception | None:
        """The misconception that explains all answers, if there is one."""
        for wrong in self.misconceptions:
            theirs = (self.answers(wrong.answer, case) for case in cases)
            if all(self.distance(a, b) <= self.tolerance for a, b in zip(mine, theirs, strict=True)):
                return wrong
        return None

    def show(self, answer: Answer) -> str:
        """A number with its unit, a few whole numbers, or the shapes of tensors."""
        if all(v.ndim == 0 for v in answer):
            return ", ".join(f"{v.item() / self.unit[1]:,.4g} {self.unit[0]}".rstrip() for v in answer)
        if len(answer) == 1 and answer[0].ndim == 1 and len(answer[0]) <= 4 and answer[0].equal(answer[0].round()):
            return ", ".join(f"{n:g}" for n in answer[0].tolist())
        shapes = [" x ".join(map(str, v.shape)) for v in answer]
        return shapes[0] if len(set(shapes)) == 1 else ", ".join(shapes)

    def compare(self, mine: Answer, right: Answer) -> str:
        """How `mine` compares, in a few words: a ratio where there is one."""
        far = self.distance(mine, right)
        if far <= self.tolerance:
            return "agrees"
        if far == float("inf"):
            return "another shape, or not a number"
        a, b = (torch.cat([v.flatten() for v in self.join(values)]) for values in (mine, right))
        ratio = (a @ b / (b @ b)).item()
        if (a - ratio * b).abs().max() <= self.tolerance * _largest(b):
            return f"{ratio:.3g}x the reference"
        return f"off by up to {(a - b).abs().max().item():.3g} (largest right number: {_largest(b):.3g})"


def distinct(exercise: Callable[[], Exercise], draw: Callable[[], list[Case]]) -> list[Case]:
    """Cases, drawn until the right answer and all misconceptions of `exercise()` differ from each other.

    Raises RuntimeError after 100 draws: then two of its answers are the same thing.
    """
    for _ in range(100):
        cases, asked = draw(), exercise()
        makers = [asked.reference, *(wrong.answer for wrong in asked.misconceptions)]
        answers = [[asked.answers(make, case) for case in cases] for make in makers]
        pairs = ((a, b) for i, a in enumerate(answers) for b in answers[:i])
        if all(max(map(asked.distance, a, b)) > 2 * asked.tolerance for a, b in pairs):
            return cases
    raise RuntimeError(f"{exercise().name}: no cases tell all its misconceptions and the right answer from each other")


def _largest(x: torch.Tensor) -> float:
    return max(x.abs().max().item(), 1e-30) if x.numel() else 1.0
