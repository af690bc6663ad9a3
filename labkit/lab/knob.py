"""`knob(draw, ...)`: sliders beside the picture that they change, in a notebook."""

import html
from collections.abc import Callable

import ipywidgets

from labkit.lab.plots import Picture


def knob(draw: Callable[..., Picture], **ranges: tuple[int, int, int]) -> ipywidgets.VBox:
    """A slider for each of `ranges`, (lowest, first, highest), and the picture `draw` makes of their values, with its text.

    A notebook that is not run keeps no widgets: show `draw(...)` itself in a cell before.
    """
    sliders = {
        name: ipywidgets.IntSlider(min=low, value=first, max=high, description=name, continuous_update=False)
        for name, (low, first, high) in ranges.items()
    }
    shown = ipywidgets.HTML()

    def turn(_: object = None) -> None:
        picture = draw(**{name: slider.value for name, slider in sliders.items()})
        shown.value = f'{picture.html()}<p role="status">{html.escape(picture.alt)}</p>'

    for slider in sliders.values():
        slider.observe(turn, "value")
    turn()
    return ipywidgets.VBox([*sliders.values(), shown])
