"""`check(name, fn)`: runs the learner's function on fresh ranks and says what is right, what is wrong, and why.

It knows exercises only through `labkit.lab.exercise`, and ranks only through `labkit.run`. Ranks import this file too, so it
leaves pandas and nbformat to the notebook: a second for each rank.
"""

import contextlib
import html
import linecache
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import PicklingError
from typing import Any, NamedTuple

import torch

from labkit.comm import Comm, CommError
from labkit.lab.exercise import Case, Exercise, PerRank, Traffic
from labkit.lab.exercises import find
from labkit.lab.isolate import MEMORY, Prints, confine, scratch
from labkit.launch.local import RankError, run

MIME = "application/vnd.labkit.check+json"
TIMEOUT = 9.0  # seconds for all cases of one number of ranks; half of it for an operation between them
LATE = 0.02  # seconds that rank 0 starts a case after the others: who counts on being in step is found out
MARKS = {
    "passed": ("[ok]", "#009E73"),
    "not yet": ("[..]", "#D55E00"),
    "not attempted": ("[  ]", "#999999"),
    "blocked": ("[--]", "#999999"),  # needs hardware that isn't here
    "hung": ("[!!]", "#CC79A7"),
}
_RULE = "All ranks must enter the same operations, in the same order, or they wait for each other in vain."
_OVERWRITTEN = (
    "A tensor was changed after it had been handed to comm.send, and before it had left: send doesn't wait and keeps no "
    "copy, so the receiver gets what is there by then. Receive into another tensor, or send a clone."
)
Tell = Callable[[int, int], None]
Verdict = tuple[str, str, list[dict[str, str]]]  # status, message, a row for each case
_attempts: Counter[str] = Counter()


@dataclass(frozen=True)
class CheckResult:
    """What a check found. `status` is one of MARKS; `cases` has a row (case, yours, expected, compared) for each.

    prints: what the learner's code printed, trimmed. seconds: all that the check took.
    """

    name: str
    status: str
    seed: int
    points: int
    max_points: int
    message: str
    attempt: int = 0
    hint: str = ""
    replay: str = ""
    prints: str = ""
    seconds: float = 0.0
    cases: list[dict[str, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        attempt = f" (attempt {self.attempt})" if self.attempt else ""
        return f"{MARKS[self.status][0]} {self.name}: {self.status}{attempt}, seed {self.seed}"

    def __str__(self) -> str:
        table = _frame(self.cases).to_string(index=False) if self.cases else ""
        printed = f"It printed:\n{self.prints}" if self.prints else ""
        parts = (f"{self.title}: {self.message}", table, printed, self.hint, self.replay)
        return "\n".join(part for part in parts if part)

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        said = [html.escape(part).replace("\n", "<br>") for part in (self.message, self.hint, self.replay)]
        table = _frame(self.cases).to_html(index=False, justify="left", border=0) if self.cases else ""
        body = "".join(f"<p style='margin:.4em 0'>{part}</p>" for part in said if part)
        if self.prints:
            table += f"<p style='margin:.4em 0'>It printed:</p><pre>{html.escape(self.prints)}</pre>"
        style = f"border-left:5px solid {MARKS[self.status][1]};padding:.2em .8em;max-width:60em"
        page = f"<div role='status' style='{style}'><b>{html.escape(self.title)}</b>{body}{table}</div>"
        return {"text/plain": str(self), "text/html": page, MIME: asdict(self)}


def check(name: str, fn: Callable[..., Any], *, seed: int | None = None, hint: int | None = None) -> CheckResult:
    """Runs `fn` on random cases of exercise `name`, in processes of its own, and compares with what was counted or computed.

    Args:
        seed: repeats the cases of an earlier check (each result names its seed).
        hint: show this hint, 1, 2 or 3; without it, each failed attempt shows the next.

    Raises ValueError for an exercise or a hint that doesn't exist; whatever `fn` does is in the result.
    """
    from labkit.lab.progress import note_check

    exercise = find(name)
    last = len(exercise.hints)
    if hint is not None and not 1 <= hint <= last:
        raise ValueError(f"hint={hint}: {name} has hints 1 to {last}")
    began = time.perf_counter()
    seed = random.SystemRandom().randrange(10_000) if seed is None else seed
    prints = Prints()
    with _bar() as tell:
        ((status, message, rows),) = judge(exercise, [fn], exercise.cases(random.Random(seed)), prints, tell)
    points = exercise.points if status == "passed" else 0
    note_check(name, status, points)
    tried = status in ("not yet", "hung")
    _attempts[name] += tried
    number = hint or (min(_attempts[name], last) if tried else 0)
    replay = f'Same cases again: check("{name}", {exercise.call.split("(")[0]}, seed={seed})'
    return CheckResult(
        name=name,
        status=status,
        seed=seed,
        points=points,
        max_points=exercise.points,
        message=message,
        attempt=_attempts[name] if tried else 0,
        hint=f"Hint {number} of {last}: {exercise.hints[number - 1]}" if number else "",
        replay=replay if tried else "",
        prints=str(prints),
        seconds=time.perf_counter() - began,
        cases=rows,
    )


@contextlib.contextmanager
def _bar() -> Iterator[Tell]:
    """A progress bar while a check runs in a notebook; elsewhere nothing."""
    ipython = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(ipython, "kernel"):
        yield lambda done, of: None
        return
    from IPython.display import HTML, display

    bar = display(HTML(""), display_id=True)
    try:
        yield lambda done, of: bar.update(HTML(f"<progress value='{done}' max='{of}'></progress> checking"))
    finally:
        bar.update(HTML(""))


def judge(
    exercise: Exercise, fns: list[Any], cases: list[Case], prints: Prints, tell: Tell = lambda done, of: None
) -> list[Verdict]:
    """The verdict on each of `fns`, all run by the same ranks: one that ends or hangs these takes the others with it.

    tell: called with how many numbers of ranks are done, and how many there are and one more, for comparing.
    """
    if exercise.gpus > torch.cuda.device_count():
        lacking = f"needs {exercise.gpus} GPU(s); this machine has {torch.cuda.device_count()}. Go on."
        return [("blocked", lacking, [])] * len(fns)
    verdicts: list[Verdict | None] = [_no_function(exercise, fn) for fn in fns]
    asked = [i for i, verdict in enumerate(verdicts) if verdict is None]
    cases = sorted(cases, key=lambda case: case.ranks)
    outcomes: dict[int, list[list[_Outcome]]] = {i: [] for i in asked}  # of each function: of each case, on each rank
    groups = sorted({case.ranks for case in cases})
    for done, ranks in enumerate(groups):
        tell(done, len(groups) + 1)
        if not (left := [i for i in asked if verdicts[i] is None]):
            break
        calls = [case.args for case in cases if case.ranks == ranks]
        by_rank = _on_ranks(ranks, [fns[i] for i in left], calls, exercise.spmd, prints)
        for at, i in enumerate(left):
            if not isinstance(by_rank, list):
                verdicts[i] = by_rank
                continue
            outcomes[i] += [list(case) for case in zip(*(rank[at] for rank in by_rank), strict=True)]
            if trouble := _trouble(exercise, [o for case in outcomes[i] for o in case]):
                verdicts[i] = (*trouble, [])
    tell(len(groups), len(groups) + 1)
    return [verdict or _compare(exercise, cases, outcomes[i]) for i, verdict in enumerate(verdicts)]


def _no_function(exercise: Exercise, fn: Any) -> Verdict | None:
    if fn is None or fn is Ellipsis:
        return "not attempted", f"write {exercise.call} first.", []
    if not callable(fn):
        wanted = exercise.call.split("(")[0]
        return "not yet", f"hand in the function {wanted} itself, not a result of type {type(fn).__name__}.", []
    return None


def _on_ranks(
    ranks: int, fns: list[Any], calls: list[tuple[Any, ...]], spmd: bool, prints: Prints
) -> "list[list[list[_Outcome]]] | Verdict":
    """What each rank made of the calls of each function; or what it says to the learner if the ranks didn't get that far."""
    with scratch() as folder, contextlib.redirect_stdout(prints), contextlib.redirect_stderr(prints):
        work = (folder, fns, calls, spmd)
        try:
            return run(_on_rank, ranks, TIMEOUT, args=work, collective_timeout=TIMEOUT / 2)
        except RankError as error:  # one without a rank to blame is a time-out
            said = _readable(str(error))
            status = "hung" if error.rank is None else "not yet"
            return status, f"{said}\n{_RULE}" if " waited " in said else said, []
        except (TypeError, PicklingError) as error:
            unsent = f"it can't be sent to another process: {error}. Use arguments, imports, small helpers."
            return "not yet", unsent, []


class _Outcome(NamedTuple):
    """What one call on one rank came to. kind: "value", "nothing", "no number", "raised", or "lost" (its peers)."""

    kind: str
    value: Any = None
    text: str = ""
    where: tuple[str, int] | None = None
    traffic: Traffic = Traffic({}, 0)


class _Watched:
    """A rank's `comm` that notes whether what is sent is still the same when this rank's next receive has ended.

    Later the receiver may have told that it has it, by what it sent itself; until then, changing it is a race.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._sent: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._overwritten = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def send(self, x: torch.Tensor, *args: Any, **options: Any) -> None:
        self._sent.append((x, x.clone()))
        self._comm.send(x, *args, **options)

    def recv(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        got = self._comm.recv(x, *args, **options)
        self._look()
        return got

    def _look(self) -> None:
        self._overwritten |= any(not torch.equal(x, was) for x, was in self._sent)
        self._sent.clear()

    def traffic(self) -> Traffic:
        self._look()
        calls: Counter[str] = Counter()
        for (op, *_), tally in self._comm.tallies.items():
            calls[op] += tally.calls
        return Traffic(dict(+calls), sum(tally.wire_bytes for tally in self._comm.tallies.values()), self._overwritten)


def _on_rank(
    comm: Comm, folder: Path, fns: list[Callable[..., Any]], calls: list[tuple[Any, ...]], spmd: bool
) -> list[list[_Outcome]]:
    """Runs on each rank."""
    confine(folder, MEMORY if comm.device.type == "cpu" else None)  # a GPU's driver reserves any amount of addresses
    return [_called(comm, fn, calls, spmd) for fn in fns]


def _called(comm: Comm, fn: Callable[..., Any], calls: list[tuple[Any, ...]], spmd: bool) -> list[_Outcome]:
    """One call after another, up to the first that fails."""
    outcomes: list[_Outcome] = []
    for args in calls:
        comm.reset()
        watched = _Watched(comm)
        own = [a[comm.rank] if isinstance(a, PerRank) else a for a in args]
        mine = [a.to(comm.device) if isinstance(a, torch.Tensor) else a for a in own]
        if spmd and comm.rank == 0:
            time.sleep(LATE)
        try:
            value = fn(*mine, watched) if spmd else fn(*mine)
            outcomes.append(_returned(value, watched.traffic()))
        except (Exception, SystemExit) as error:
            return [*outcomes, *[_raised(error, fn)] * (len(calls) - len(outcomes))]
    return outcomes


def _returned(value: Any, traffic: Traffic) -> _Outcome:
    if value is None or value is Ellipsis:
        return _Outcome("nothing")
    try:
        number = torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return _Outcome("no number", text=type(value).__name__)
    return _Outcome("value", number.numpy(), traffic=traffic)


def _raised(error: BaseException, fn: Any) -> _Outcome:
    if isinstance(error, NotImplementedError):
        return _Outcome("nothing")
    own = getattr(getattr(fn, "__code__", None), "co_filename", None)
    lines = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    kind = "lost" if isinstance(error, CommError) else "raised"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        text = f"{type(error).__name__}: there is no more memory. A check gives each rank {MEMORY / 1e9:g} GB."
    return _Outcome(kind, text=text, where=lines[-1] if lines else None)


def _trouble(exercise: Exercise, outcomes: list[_Outcome]) -> tuple[str, str] | None:
    """Status and message when there is nothing to compare."""
    of = {o.kind: o for o in reversed(outcomes)}  # the first of each kind
    if bad := of.get("raised"):
        line = linecache.getline(*bad.where).strip() if bad.where else ""
        at = f"in line {bad.where[1]}: {line}" if bad.where else f"It is called as {exercise.call}."
        return "not yet", f"it raised {bad.text}\n{at}"
    if bad := of.get("lost"):
        return "hung", f"{bad.text.split(': [')[0]}\n{_RULE}"
    if list(of) == ["nothing"]:
        return "not attempted", f"{exercise.call} returns nothing yet."
    if "nothing" in of:
        return (
            "not yet",
            "it returns nothing in some cases, or on some ranks. Every call must return a result, on every rank.",
        )
    if bad := of.get("no number"):
        return "not yet", f"it returned a value of type {bad.text}; a number or a tensor is needed."
    return None


def _compare(exercise: Exercise, cases: list[Case], outcomes: list[list[_Outcome]]) -> Verdict:
    mine = [[torch.from_numpy(o.value) for o in case] for case in outcomes]
    rows = []
    for case, answer in zip(cases, mine, strict=True):
        right = exercise.answers(exercise.reference, case)
        text = f"{case.text}, {case.ranks} ranks" if exercise.spmd else case.text
        shown = (text, exercise.show(answer), exercise.show(right), exercise.compare(answer, right))
        rows.append(dict(zip(("case", "yours", "expected", "compared"), shown, strict=True)))
    wrong = [row for row in rows if row["compared"] != "agrees"]
    if not wrong:
        largest_first = reversed(
            [(case, o.traffic) for case, ranks in zip(cases, outcomes, strict=True) for o in ranks]
        )
        broken = next((said for seen in largest_first if (said := exercise.rule(*seen))), "")
        return ("not yet", broken, []) if broken else ("passed", f"{len(cases)} cases agree. {exercise.moral}", [])
    message = f"wrong in {len(wrong)} of {len(cases)} cases, e.g. {wrong[0]['case']}: {wrong[0]['compared']}."
    if known := exercise.diagnose(mine, cases):
        message += f"\nThat is what you get when {known.name}. {known.why}"
    elif any(o.traffic.overwritten for case in outcomes for o in case):
        message += f"\n{_OVERWRITTEN}"
    return "not yet", message, rows


def _frame(rows: list[dict[str, str]]) -> Any:
    import pandas as pd

    return pd.DataFrame(rows)


def _readable(error: str) -> str:
    """A launcher's error without tracebacks, and of its stacks only the learner's lines."""
    lines = error.split("\n\n")[0].splitlines()
    ours = (str(Path(__file__).parents[1]), "site-packages", "<string>")
    return "\n".join(line for line in lines if not any(part in line for part in ours))
