"""The figures of the lesson on expert parallelism."""

import matplotlib.colors
import pytest

from labkit.lab import plots
from labkit.lab.plots import Picture


def alt(picture: Picture) -> str:
    data, metadata = picture._repr_mimebundle_()
    assert len(data["image/png"]) > 1000
    assert metadata["image/png"]["alt"] == data["text/plain"]
    return data["text/plain"]


def texts(picture: Picture) -> list[list[str]]:
    """What is written inside each pair of axes."""
    return [[text.get_text() for text in ax.texts] for ax in picture.axes]


def test_expert_load_says_how_busy_the_busiest_expert_is() -> None:
    picture = plots.expert_load([{"layer": 3, "tokens": [10, 1000, 30, 0]}])
    assert "layer 3: 10, 1000, 30, 0, busiest expert 3.85 times the mean" in alt(picture)
    assert texts(picture)[0] == ["10", "1,000", "30", "0", "3.85"]


def test_expert_load_names_ranks_where_there_are_several() -> None:
    layer = {"layer": 0, "tokens": [10, 40, 20, 30], "placement": [[0, 3], [1, 2]]}
    picture = plots.expert_load([layer, {**layer, "layer": 1, "placement": [[0, 1], [2, 3]], "tokens": [0, 0, 0, 0]}])
    assert "layer 0: 10, 40, 20, 30, busiest rank 1.20 times the mean" in alt(picture)
    assert texts(picture)[0][:4] == ["10  r0", "40  r1", "20  r1", "30  r0"]
    assert texts(picture)[0][-2:] == ["1.20", "1.00"]
    alone = plots.expert_load([{"layer": 0, "tokens": [1, 2], "placement": [[0, 1]]}])
    assert "busiest expert 1.33" in alt(alone)


def test_byte_matrix_sets_what_stays_apart() -> None:
    picture = plots.byte_matrix({"dispatch": [[9000, 2000], [1000, 0]], "combine": [[9000, 1000], [2000, 0]]})
    assert "dispatch: rank 0 to 0 9, rank 0 to 1 2, rank 1 to 0 1, rank 1 to 1 0; combine: rank 0 to 0 9" in alt(
        picture
    )
    assert [ax.get_title() for ax in picture.axes] == ["dispatch, kB", "combine, kB"]
    dispatch = picture.axes[0]
    assert dispatch.images[0].get_array().tolist() == [[0, 2000], [1000, 0]]  # colours: only what leaves
    assert len(dispatch.patches) == 2 and all(patch.get_hatch() for patch in dispatch.patches)
    alt(plots.byte_matrix({"dispatch": [[5, 0], [0, 5]]}))  # nothing leaves
    with pytest.raises(ValueError, match="all_to_all"):
        plots.byte_matrix({})


@pytest.mark.parametrize("count", [0, 50, 100])
def test_numbers_can_be_read_on_their_colour(count: int) -> None:
    ax = plots.expert_load([{"layer": 0, "tokens": [count, 100, 0, 0]}]).axes[0]
    colour = ax.images[0].cmap(ax.images[0].norm(ax.images[0].get_array()[0, 0]))
    ink = matplotlib.colors.to_rgb(ax.texts[0].get_color())
    assert abs(luminance(colour) - luminance(ink)) > 0.3


def luminance(colour: tuple[float, ...]) -> float:
    red, green, blue = colour[:3]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
