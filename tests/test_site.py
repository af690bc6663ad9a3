"""The pages that `labkit lessons` leaves: they open from a disk, lead to each other, and say what was measured."""

import re

import nbformat
import pytest

from labkit.lab import plots, site
from labkit.lab.predict_then import Prediction


def shown(*things):
    cell = nbformat.v4.new_code_cell("show()")
    for thing in things:
        bundle = thing._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        cell.outputs.append(nbformat.v4.new_output("display_data", data, metadata=metadata))
    return cell


def knobless(text="VBox(children=(IntSlider()))"):
    cell = nbformat.v4.new_code_cell("knob(...)")
    cell.outputs = [nbformat.v4.new_output("display_data", {site._WIDGET: {"model_id": "1"}, "text/plain": text})]
    return cell


def book(path, title, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(title), *cells]), path)


@pytest.fixture
def out(tmp_path):
    """The site of a lab with an executed lesson and an exercise."""
    lab, out = tmp_path / "lab", tmp_path / "out"
    text = "# Who gains?\n\n[Try it](../exercises/try_it.ipynb), [before](00_first.ipynb), [a paper](https://example.org/p)"
    book(lab / "notebooks" / "04_gains.ipynb", text)
    book(lab / "exercises" / "try_it.ipynb", "# Try it\n\n[back](../notebooks/04_gains.ipynb)")
    executed = (shown(plots.lanes(2, 1), Prediction("bubble <1>", None, 0.5, 0.55, "of all")), knobless())
    book(out / "04_gains.ipynb", text, *executed)
    row = {"name": "04_gains", "status": "passed", "seconds": 12.3, "grade": "1/1", "error": ""}
    rows = [
        {**row, "figures": site.predictions(nbformat.read(out / "04_gains.ipynb", as_version=4))},
        {**row, "name": "solutions/try_it", "status": "failed", "figures": [], "error": "wrong <here>"},
    ]
    assert site.write(lab, out, rows) == out / "index.html"
    return out


def test_pages_load_and_run_nothing(out):
    pages = sorted(out.rglob("*.html"))
    assert [p.relative_to(out).as_posix() for p in pages] == ["04_gains.html", "exercises/try_it.html", "index.html"]
    for page in pages:
        text = page.read_text()
        assert "<script" not in text and "<link" not in text and "@import" not in text
        assert all(source.startswith(("data:", "figures/")) for source in re.findall(r'src="([^"]*)"', text))


def test_links_lead_to_pages_or_nowhere(out):
    for page in out.rglob("*.html"):
        targets = re.findall(r'href="([^"#]+)"', page.read_text())
        assert targets
        assert all(target.startswith("https://") or (page.parent / target).exists() for target in targets)
    lesson = (out / "04_gains.html").read_text()
    assert 'href="exercises/try_it.html"' in lesson and 'href="https://example.org/p"' in lesson
    assert 'title="00_first.ipynb"' in lesson  # which was not run
    assert 'href="../04_gains.html"' in (out / "exercises" / "try_it.html").read_text()


def test_the_index_has_status_time_grade_key_figures_and_pictures_with_text(out):
    index = (out / "index.html").read_text()
    for essential in (
        "Who gains?",
        "passed",
        ">12<",
        "1/1",
        "bubble &lt;1&gt;",
        "0.55 of all",
        ">0.5<",
        "wrong &lt;here&gt;",
    ):
        assert essential in index
    ((file, alt),) = re.findall(r'<img src="([^"]+)" alt="([^"]+)"', index)
    assert (out / file).read_bytes().startswith(b"\x89PNG") and alt == plots.lanes(2, 1).alt


def test_a_widget_leaves_a_sentence(out):
    assert "a slider where this notebook is run" in (out / "04_gains.html").read_text()
    assert "IntSlider" not in (out / "04_gains.html").read_text()
