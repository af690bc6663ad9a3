"""`predict_then(name, guess, measured)`: what the reader guessed, what the formula says, and what was measured, side by side."""

import html
import math
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from labkit.lab.progress import note_prediction, notes

MIME = "application/vnd.labkit.prediction+json"
Number = int | float | None


@dataclass(frozen=True)
class Prediction:
    """One row of the calibration table. Ratios are to the measured value: 2.0x is twice too high."""

    name: str
    guess: Number
    model: Number
    measured: float
    unit: str = ""

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """(who, value, how it compares)"""
        you = ("you", self._value(self.guess), self._ratio(self.guess) or "no guess: put a number in the cell above")
        model = [] if self.model is None else [("the formula", self._value(self.model), self._ratio(self.model))]
        return [you, *model, ("measured", self._value(self.measured), "")]

    def _value(self, value: Number) -> str:
        return "-" if value is None else f"{value:,.4g} {self.unit}".rstrip()

    def _ratio(self, value: Number) -> str:
        if value is None:
            return ""
        return f"{value / self.measured:.2f}x the measured value" if self.measured else f"off by {abs(value):.4g}"

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in self.rows) for i in range(2)]
        lines = [
            f"  {who.ljust(widths[0])}  {value.rjust(widths[1])}  {ratio}".rstrip() for who, value, ratio in self.rows
        ]
        return "\n".join([self.name, *lines])

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        def row(values: tuple[str, str, str]) -> str:
            who, value, ratio = map(html.escape, values)
            return f"<tr><th style='text-align:left'>{who}</th><td style='text-align:right'>{value}</td><td>{ratio}</td></tr>"

        table = f"<table><caption>{html.escape(self.name)}</caption>{''.join(map(row, self.rows))}</table>"
        return {"text/plain": str(self), "text/html": table, MIME: asdict(self)}


class _PredictThen:
    """Callable; it keeps one row per name for as long as the kernel lives, and `table()` shows them all."""

    def __init__(self) -> None:
        self.kept: dict[str, Prediction] = {}

    def __call__(
        self, name: str, guess: Number, measured: float, *, model: Number = None, unit: str = ""
    ) -> Prediction:
        """Compares `guess` (None: no guess made) and the `model`'s figure with what was `measured`; all in `unit`."""
        for what, value in {"guess": guess, "model": model, "measured": measured}.items():
            if value is None and what != "measured":
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{what}={value!r}: use a finite number" + ("" if what == "measured" else ", or None"))
        self.kept[name] = Prediction(name, guess, model, measured, unit)
        note_prediction(name, guess, model, measured, unit)
        return self.kept[name]

    def table(self, *, course: bool = False) -> pd.DataFrame:
        """Every prediction so far, with its ratios to the measured value: the nearer to 1, the better.

        course: those of all lessons, as they were noted, not only of this notebook.
        """
        columns = ["what", "unit", "you", "formula", "measured", "you / measured", "formula / measured"]
        rows = [
            (p.name, p.unit, p.guess, p.model, p.measured, _ratio(p.guess, p.measured), _ratio(p.model, p.measured))
            for p in (_noted() if course else self.kept.values())
        ]
        return pd.DataFrame(rows, columns=columns).set_index("what").round(3).astype(object).fillna("-")


def _noted() -> list[Prediction]:
    fields = ("guess", "model", "measured", "unit")
    return [Prediction(name, *(row[f] for f in fields)) for name, row in notes()["predictions"].items()]


def _ratio(value: Number, measured: Number) -> float | None:
    return value / measured if value is not None and measured else None


predict_then = _PredictThen()
