"""A planner to play with in a notebook: controls, and below them at once the layouts, their memory, times and launch lines.

It only shows what `labkit.predict.plan` finds. A notebook that is run without a browser keeps no widget's state: put
`plots.plan` beside it.
"""

import html
from typing import Any

import ipywidgets as widgets

from labkit.lab import plots
from labkit.model.shapes import SHAPES
from labkit.predict.hardware import table
from labkit.predict.plan import OBJECTIVES, plan, words
from labkit.predict.shape import OTHERS

GPUS = (1, 2, 4, 8, 16, 32)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Planner(widgets.VBox):
    """Shows `result`, what `plan` finds for the values of `controls`: model, hardware, gpus, context, batch, objective."""

    def __init__(self, **chosen: Any) -> None:
        """chosen: what the controls begin with. Raises TypeError for a control, TraitError for a value, that doesn't exist."""
        options = {
            "model": sorted({**SHAPES, **OTHERS}), "hardware": list(table()), "gpus": GPUS, "context": CONTEXTS,
            "batch": BATCHES, "objective": OBJECTIVES,
        }  # fmt: skip
        if wrong := set(chosen) - set(options):
            raise TypeError(f"no control {', '.join(sorted(wrong))}: use {', '.join(options)}")
        chosen = {"model": "llama-2-70b", "hardware": "h100-sxm", "gpus": 8, "context": 2048, "batch": 8} | chosen
        self.controls: dict[str, Any] = {
            name: (widgets.SelectionSlider if isinstance(values, tuple) and name != "objective" else widgets.Dropdown)(
                options=values, value=chosen.get(name, values[0]), description=name
            )
            for name, values in options.items()
        }
        self.result: dict[str, Any] = {}
        self.text, self.picture = widgets.HTML(), widgets.HTML()
        for control in self.controls.values():
            control.observe(self._plan, "value")
        self._plan()
        grid = widgets.GridBox(list(self.controls.values()), layout={"grid_template_columns": "repeat(3, 33%)"})
        super().__init__([grid, self.text, self.picture])

    def _plan(self, _: Any = None) -> None:
        asked = {name: control.value for name, control in self.controls.items()}
        model, on = asked.pop("model"), asked.pop("hardware")
        self.result = plan(model, on, **asked)
        self.picture.value = plots.plan(self.result).html()
        self.text.value = _told(self.result)


def _told(result: dict[str, Any]) -> str:
    """The best layout, why, and how to start it; or why nothing fits."""
    best = result["recommended"]
    if best is None:
        nearest = min(
            (row for row in result["layouts"] if row["memory"]), key=lambda row: row["memory_gb_per_gpu"], default=None
        )
        why = f" Nearest is {words(nearest['layout'])}: {nearest['reason']}." if nearest else ""
        return f"<p><b>Nothing fits.</b>{html.escape(why)}</p>"
    lines = "".join(
        f"<pre style='white-space:pre-wrap'>{html.escape(line)}</pre>" for line in best["commands"].values()
    )
    said = (
        f"{best['tpot_ms']:.1f} ms per token, {best['ttft_ms']:.0f} ms to the first, {best['tokens_per_s']:,.0f} tokens/s; "
        f"room for {best['max_batch']} sequences. {best['reason']}. {result['refused']} layouts don't fit."
    )
    return f"<p><b>{words(best['layout'])}</b>: {html.escape(said)}</p><details><summary>start it</summary>{lines}</details>"
