"""The least time that a machine's memory and arithmetic allow, against the weights that a decoder really has."""

import math

import pytest
import torch

from labkit.comm import Comm
from labkit.measure import bench, roofline
from labkit.measure.roofline import Roof
from labkit.mesh import Alone
from labkit.model.decoder import Decoder
from labkit.model.find import find

GB, TERA = 1e9, 1e12
SMOL = {"kv": 30 * 2 * 3 * 64, "score": 30 * 4 * 9 * 64}  # numbers cached for a token; operations for a query and a key


def matrices(model: str) -> int:
    """Numbers in a model's matrices."""
    decoder = Decoder(find(model).config, Comm(Alone()), torch.bfloat16)
    return sum(p.numel() for p in decoder.parameters() if p.dim() > 1)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_one_token_takes_as_long_as_its_weights_and_cache_are_read(dtype: str, width: int) -> None:
    roof = Roof(memory_gb_per_s=20, tflops=1e6)
    seconds = roof.seconds("smollm2-135m", dtype, 1, tokens=1, sequences=1, kv_tokens=100, pairs=100)
    assert seconds * 20 * GB == pytest.approx(width * (matrices("smollm2-135m") + 100 * SMOL["kv"]))
    twice = roof.seconds("smollm2-135m", dtype, 2, tokens=2, sequences=2, kv_tokens=200, pairs=200)
    assert twice == pytest.approx(2 * seconds)  # two passes read the weights twice, one of both once
    once = roof.seconds("smollm2-135m", dtype, 1, tokens=2, sequences=2, kv_tokens=200, pairs=200)
    assert once * 20 * GB == pytest.approx(width * (matrices("smollm2-135m") + 200 * SMOL["kv"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_prompt_takes_as_long_as_its_products(dtype: str) -> None:
    seconds = Roof(1e9, 0.5).seconds("smollm2-135m", dtype, 1, tokens=512, sequences=1, kv_tokens=0, pairs=512**2 / 2)
    head = 49152 * 576
    products = 2 * (512 * (matrices("smollm2-135m") - head) + head)  # logits of the last token alone
    scores = SMOL["score"] * 512**2 / 2 / (2 if dtype == "float32" else 1)  # counted at twice float32's rate
    assert seconds * 0.5 * TERA == pytest.approx(products + scores)


def test_of_experts_those_are_read_that_are_asked_for() -> None:
    cfg, width = find("tiny-moe").config, 2
    moe, sparse = cfg.moe, sum(map(cfg.sparse, range(cfg.layers)))
    assert moe
    roof = Roof(1, 1e9)
    few, many = (
        roof.seconds("tiny-moe", "bfloat16", 1, tokens=n, sequences=n, kv_tokens=0, pairs=0) * GB for n in (1, 10**6)
    )
    assert many == pytest.approx(width * matrices("tiny-moe"), rel=1e-3)
    each = 3 * cfg.hidden * moe.width * width * sparse
    assert many - few == pytest.approx(each * (moe.experts - moe.per_token), rel=1e-3)


@pytest.mark.parametrize(
    ("layout", "batch", "passes"), [({"pp": 2}, 1, 1), ({"pp": 2}, 4, 2), ({"dp": 2}, 4, 2), ({"dp": 2, "ep": 2}, 4, 1)]
)
def test_each_lane_and_replica_reads_the_weights(layout: dict[str, int], batch: int, passes: int) -> None:
    row = {
        "layout": {"tp": 1, "pp": 1, "dp": 1, "ep": 1} | layout, "batch": batch, "prompt_tokens": 8, "new_tokens": 4,
        "tpot_ms": 50.0, "model": "smollm2-135m", "dtype": "bfloat16", "ranks": [],
    }  # fmt: skip
    found = bench._under(row, [Roof(20, 1e6), Roof(10, 1e6), Roof(1, 1e6)])
    read = 2 * (passes * matrices("smollm2-135m") + batch * 10 * SMOL["kv"])
    assert found["memory_gb_per_s"] == 10
    assert found["roofline_share"] == pytest.approx(read / (10 * GB) / 0.05)


def test_what_is_measured_is_a_machines() -> None:
    """No machine reads a byte in a year or a terabyte in a millisecond."""
    before = torch.get_num_threads()
    found = roofline.measure("cpu", 1, "float32")
    assert torch.get_num_threads() == before
    assert 0.1 < found.memory_gb_per_s < 1e5 and 1e-4 < found.tflops < 1e3
    assert math.isfinite(found.seconds("smollm2-135m", "float32", 1, tokens=1, sequences=1, kv_tokens=1, pairs=1))
