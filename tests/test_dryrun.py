"""The dry run: its numbers are those of real ranks, on every layout; and what it says of models that no machine here holds."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labkit import Layout, run
from labkit.comm import Comm
from labkit.engine.core import Engine, EngineOptions, Plan
from labkit.engine.report import assemble
from labkit.engine.requests import Request, SamplingParams
from labkit.engine.scheduler import Step
from labkit.model.find import find
from labkit.model.shapes import SHAPES
from labkit.parallel.expert import Spread
from labkit.predict.dryrun import Allocated, Routing, dryrun, wire_bytes_per_token
from labkit.predict.shape import config_of
from labkit.split import LayoutError, even

BATCH, CONTEXT = 3, 24
DENSE = [
    Layout(tp=t, pp=p, dp=d) for t in range(1, 5) for p in range(1, 5) for d in range(1, 5) if t * p * d <= 4
]  # fmt: skip
SPREAD = [Layout(x.tp, x.pp, x.dp, expert_parallel=True) for x in DENSE if x.tp * x.dp > 1]


class Recording(Engine):
    """Notes which experts the routers pick for each token that this rank brings: {layer: {(request, position): experts}}."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.picked: dict[int, dict[tuple[int, int], list[int]]] = {}
        for number, moe in self.decoder.moes.items():
            moe.router.register_forward_hook(partial(self._note, number))

    def _forward(self, plan: Plan, *hidden: Any) -> Any:
        step, mesh = plan.get(self.replica) or Step(), self.comm.mesh
        starts = zip(step.requests, step.starts, step.tokens, strict=True)
        tokens = [(request.index, start + i) for request, start, ids in starts for i in range(len(ids))]
        part = even(len(tokens), mesh.size("tp"))[mesh.tp_rank]
        self.mine = tokens[part.start : part.stop]
        return super()._forward(plan, *hidden)

    def _note(self, number: int, router: object, args: object, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        if len(result[0]) == len(self.mine):  # an all-to-all's router sees this rank's tokens alone
            self.picked.setdefault(number, {}).update(zip(self.mine, result[0].tolist(), strict=True))


def serve(comm: Comm, name: str, options: EngineOptions) -> tuple[dict[str, Any], dict]:
    """The report of a rank that served prompts of random tokens, and what its routers picked."""
    engine = Recording(find(name), comm, options)
    generate(engine)
    return engine.report(), engine.picked


def generate(engine: Engine) -> None:
    ids = torch.randint(0, 2000, (BATCH, CONTEXT - 1), generator=torch.Generator().manual_seed(5)).tolist()
    params = SamplingParams(temperature=0.0)
    for _ in engine.generate([Request(i, prompt, params, 0, frozenset(), 2) for i, prompt in enumerate(ids)]):
        pass


def both(name: str, layout: Layout, exchange: str = "all_to_all") -> tuple[dict[str, Any], dict[str, Any]]:
    """A real run's report and a dry run of the same."""
    options = EngineOptions("float32", CONTEXT, -(-BATCH // layout.dp), 4096, seed=0, spread=Spread(exchange))
    results = run(partial(serve, name=name, options=options), ranks=layout.world, layout=layout, timeout=120)
    ranks = [report for report, _ in results]
    table: dict[int, np.ndarray] = {}
    for _, picked in results:
        for layer, each in picked.items():
            for (request, position), chosen in each.items():
                table.setdefault(layer, np.zeros((BATCH, CONTEXT, len(chosen)), int))[request, position] = chosen
    real = assemble(layout, options, 1, ranks, [])
    for rank, report in zip(real["ranks"], ranks, strict=True):
        phases = ("prefill", "decode")
        rank["wire_bytes_per_token"] = {phase: wire_bytes_per_token(report, phase) for phase in phases}
    dry = dryrun(
        name, tp=layout.tp, pp=layout.pp, dp=layout.dp, ep=layout.expert_parallel, batch=BATCH, context=CONTEXT,
        dtype="float32", exchange=exchange, routing=Routing(table=table),
    )  # fmt: skip
    return real, dry


def assert_equal(real: dict[str, Any], dry: dict[str, Any]) -> None:
    for theirs, mine in zip(real["ranks"], dry["ranks"], strict=True):
        for name in ("rank", "place", "stage", "layers", "weights_bytes", "kv_bytes", "wire_bytes_per_token"):
            assert mine[name] == theirs[name], (mine["rank"], name)
    names = ("calls_per_token", "payload_bytes_per_token", "wire_bytes_per_token")

    def rows(report: dict[str, Any]) -> dict[tuple[str, ...], tuple[float, ...]]:
        keys = ("op", "axis", "phase", "what")
        return {tuple(row[k] for k in keys): tuple(row[n] for n in names) for row in report["comm"]}

    assert rows(dry) == rows(real)


def shown(layout: Layout) -> str:
    return f"tp{layout.tp} pp{layout.pp} dp{layout.dp}" + " ep" * layout.expert_parallel


@pytest.mark.slow
@pytest.mark.parametrize("layout", DENSE, ids=shown)
def test_smollm2_equals_a_real_run(layout: Layout) -> None:
    assert_equal(*both("smollm2-135m", layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", DENSE + SPREAD, ids=shown)
def test_tiny_moe_with_its_measured_routing_equals_a_real_run(layout: Layout) -> None:
    real, dry = both("tiny-moe", layout)
    assert_equal(real, dry)
    assert dry["experts"]["bytes"] == real["experts"]["bytes"]


@pytest.mark.parametrize("exchange", ["all_gather", "all_reduce"])
def test_other_exchanges_equal_a_real_run(exchange: str) -> None:
    assert_equal(*both("tiny-moe", Layout(tp=2, dp=2, expert_parallel=True), exchange))


def test_peak_is_what_a_real_run_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_KERNELS", "torch")  # what C computes in between is no tensor
    dry = dryrun("smollm2-135m", batch=BATCH, context=CONTEXT, dtype="float32", device="cpu")["ranks"][0]
    [real] = run(peak, ranks=1, timeout=120)
    assert dry["peak_bytes"] == pytest.approx(real, rel=1e-4)
    assert dry["peak_bytes"] > dry["weights_bytes"] + dry["kv_bytes"]


def peak(comm: Comm) -> int:
    options = EngineOptions("float32", CONTEXT, BATCH, 4096, seed=0)
    with torch.inference_mode(), Allocated("cpu") as allocated:
        engine = Engine(find("random:smollm2-135m"), comm, options)
        allocated.peak = allocated.now
        generate(engine)
    return allocated.peak


def test_405b_on_16_gpus_and_175b_three_ways() -> None:
    large = dryrun("llama-3.1-405b", tp=8, pp=2, context=64)
    for rank in large["ranks"]:
        embedding = 128256 * 16384 * (1 if rank["stage"] == 0 else -1)  # on the first stage, all else on both
        assert rank["weights_bytes"] == pytest.approx((405_853_388_800 + embedding) * 2 / 16, rel=0.001)
        assert (
            rank["kv_bytes"] == 63 * 2 * 64 * 128 * 2
        )  # layers, K and V, tokens, one KV head of 128 numbers, 2 bytes each
        assert 0 < rank["peak_bytes"] - rank["weights_bytes"] - rank["kv_bytes"] < 0.1e9
    calls = {(row["axis"], row["what"]): row["calls_per_token"] for row in large["comm"] if row["phase"] == "decode"}
    assert calls["tp", "attention"] == calls["tp", "mlp"] == 63  # on each stage: two per layer, whatever the degree
    for tp, pp in ((8, 1), (1, 8), (2, 4)):
        ranks = dryrun("gpt-3-175b", tp=tp, pp=pp, context=16)["ranks"]
        mean = sum(rank["weights_bytes"] for rank in ranks) / 8
        assert mean == pytest.approx(174.6e9 * 2 / 8, rel=0.01)  # not 87.5 GB, which forgets tp


def test_skewed_routing_gives_some_ranks_more() -> None:
    layout = {"dp": 4, "ep": True, "batch": 8, "context": 64}
    even_load = dryrun("tiny-moe", **layout)
    skewed = dryrun("tiny-moe", **layout, routing=Routing(loads={n: [16, 8, 4, 2, 1, 1, 1, 1] for n in range(6)}))
    assert even_load["experts"]["busiest_over_mean"] < 1.05
    assert skewed["experts"]["busiest_over_mean"] > 1.4
    received = np.array(skewed["experts"]["bytes"]["dispatch"]).sum(0)
    assert received[0] > 1.5 * received[3]


def test_a_config_file_and_uneven_stages(tmp_path: Path) -> None:
    config = SHAPES["tinyllama-1.1b"] | {"num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ranks = dryrun(str(tmp_path / "config.json"), pp=2, context=16, device="cpu")["ranks"]
    assert sum(rank["layers"] for rank in ranks) == 5
    assert ranks[0]["kv_bytes"] / ranks[0]["layers"] == ranks[1]["kv_bytes"] / ranks[1]["layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp": 65}, "tensor_parallel_size=65 does not fit 64 query heads"),
        ({"ep": True}, "has no experts"),
        ({"context": 1}, "2 to 4096"),
        ({"dtype": "int4"}, "'float32'"),
        ({"exchange": "mail"}, "all_to_all"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((LayoutError, ValueError), match=message):
        dryrun("llama-2-70b", **arguments)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt-3-175b", 174.6), ("llama-2-7b", 6.74), ("llama-2-13b", 13.02), ("llama-2-70b", 68.98), ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-3.1-405b", 405.85),
        ("mistral-7b", 7.248), ("mistral-large-2", 122.61), ("qwen2.5-7b", 7.616), ("qwen2.5-72b", 72.71),
        ("qwen3-8b", 8.191), ("qwen3-32b", 32.76), ("mixtral-8x7b", 46.70), ("mixtral-8x22b", 140.62),
        ("qwen3-30b-a3b", 30.53), ("qwen3-235b-a22b", 235.09), ("smollm2-135m", 0.1345), ("tinyllama-1.1b", 1.100),
    ],
)  # fmt: skip
def test_registered_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    cfg = config_of(name)
    per_layer = cfg.layer_params + (cfg.moe.experts * cfg.hidden if cfg.moe else 0)
    params = cfg.layers * per_layer + cfg.vocab * cfg.hidden * (1 if cfg.tied else 2)
    assert params / 1e9 == pytest.approx(billions, rel=0.001)
