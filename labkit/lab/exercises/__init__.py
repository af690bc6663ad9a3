"""All exercises by name; each file here holds those of one subject."""

import difflib

from labkit.lab.exercise import Exercise
from labkit.lab.exercises import communication, expert, memory, pipeline, planning, tensor

EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for subject in (memory, tensor, communication, pipeline, expert, planning)
    for exercise in subject.EXERCISES
}


def find(name: str) -> Exercise:
    """The exercise called `name`. Raises ValueError, naming the known ones."""
    if name in EXERCISES:
        return EXERCISES[name]
    near = difflib.get_close_matches(str(name), EXERCISES, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"no exercise {name!r}{meant}: use one of {', '.join(EXERCISES)}")
