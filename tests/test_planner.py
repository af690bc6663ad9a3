"""The notebook's planner: its controls change what is planned, shown and said; `plots.plan` says in words what it draws."""

import pytest

from labkit.lab import plots
from labkit.lab.planner import Planner
from labkit.predict.plan import plan


def test_a_control_changes_plan_picture_and_text():
    planner = Planner(model="llama-3.1-405b", hardware="h100-sxm", gpus=16, batch=1, context=2048)
    assert planner.result["recommended"]["layout"]["tp"] == 16 and "<b>tp=16</b>" in planner.text.value
    assert "--tensor-parallel-size 16" in planner.text.value
    before = planner.picture.value
    assert 'alt="Plans for llama-3.1-405b on 16 x h100-sxm.' in before and "data:image/png;base64," in before
    planner.controls["objective"].value = "throughput"
    assert "<b>tp=8 x pp=2</b>" in planner.text.value and planner.picture.value != before


def test_what_does_not_fit_is_said_with_the_nearest_layout():
    planner = Planner(model="llama-3.1-405b", hardware="a100-80gb", gpus=8)
    assert planner.result["recommended"] is None
    assert (
        "<b>Nothing fits.</b> Nearest is tp=8:" in planner.text.value
        and "more than the 72.0 usable" in planner.text.value
    )
    assert "none fits" in plots.plan(planner.result).alt


def test_a_control_that_does_not_exist_is_refused_by_name():
    with pytest.raises(TypeError, match=r"no control colour: use model, hardware, gpus"):
        Planner(colour="blue")


def test_the_picture_of_a_plan_tells_memory_time_and_front():
    planned = plan("llama-2-70b", "h100-sxm", gpus=4, batch=8)
    alt = plots.plan(planned).alt
    best = planned["layouts"][0]
    assert f"tp=4: {best['memory_gb_per_gpu']:.3g} GB (weights {best['memory']['weights_gb']:.3g}, KV cache" in alt
    assert f"Time per token: tp=4: {best['tpot_ms']:.3g} ms (weights " in alt
    assert f"Beaten by none: tp=4: {best['max_tokens_per_s']:,.0f} tokens/s" in alt
    data, _ = plots.plan(planned)._repr_mimebundle_()
    assert len(data["image/png"]) > 1000
