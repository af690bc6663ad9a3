"""Which layout, and how fast. The references are the engine's own decoder, the cost model and the planner."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from labkit.engine.core import BLOCK
from labkit.lab.exercise import Case, Exercise, Misconception, distinct
from labkit.lab.exercises.memory import GB, LLAMA_70B, Shape, stages
from labkit.mesh import Layout
from labkit.predict import hardware as hw_
from labkit.predict import shape as sizes
from labkit.predict.cost import Deployment, Load, engine, predict
from labkit.predict.plan import plan


def _published(name: str) -> Shape:
    config = sizes.config_of(name)
    return Shape(
        config.layers, config.hidden, config.intermediate, config.heads, config.kv_heads, config.head_dim, config.vocab,
        config.tied, 2,
    )  # fmt: skip


# Of the question that the notebook begins with: hardware, sequences.
CASE_405B = tuple((hardware, batch) for hardware in ("h100-sxm", "h100-sxm,internode_gbs=2") for batch in (1, 64))

# -- weights of a hybrid layout ----------------------------------------------------------------------------------------


def _fullest(model: Shape, tp: int, pp: int, dp: int) -> int:
    return max(stage.weights for stage in stages(model, tp, pp, 1, BLOCK))


def _hybrid_cases(rng: random.Random) -> list[Case]:
    """GPT-3's shape on 8 GPUs and Llama 3.1 405B's on 16; then random ones, whose ends are small beside a stage."""
    gpt3, large = _published("gpt-3-175b"), _published("llama-3.1-405b")
    other = Shape(rng.choice((64, 80, 96)), 8192, 28672, 64, 8, 128, 32000, False, rng.choice((1, 2)))
    layouts = [(gpt3, 2, 4, 1), (large, 8, 2, 1), (other, *rng.choice(((2, 2, 4), (4, 2, 2), (8, 2, 2), (2, 4, 2))))]
    layouts.append((other, 1, rng.choice((2, 4)), 1))
    return [Case(at, f"{at[0]}, tp={at[1]}, pp={at[2]}, dp={at[3]}") for at in layouts]


HYBRID = Exercise(
    name="planning.per_gpu",
    call="per_gpu(model, tp, pp, dp)",
    cases=_hybrid_cases,
    reference=_fullest,
    unit=("GB", GB),
    tolerance=0.04,
    misconceptions=(
        Misconception("only the stages divide the weights: tp is forgotten",
            "A stage's layers are cut over its tp ranks. 350 GB at TP=2 x PP=4 are 43.75 GB on each GPU; 87.5 forgets TP.",
            lambda m, tp, pp, dp: m.total / pp),
        Misconception("only tensor parallelism divides the weights: the stages are forgotten",
            "A rank holds the layers of its own stage alone.", lambda m, tp, pp, dp: m.total / tp),
        Misconception("the replicas share the weights too",
            "Data parallelism shares out requests. Each replica holds the whole model, on its tp x pp ranks.",
            lambda m, tp, pp, dp: m.total / (tp * pp * dp)),
        Misconception("the degrees are added up instead of multiplied",
            "Each of pp stages is cut tp ways: tp x pp parts in all.", lambda m, tp, pp, dp: m.total / (tp + pp)),
        Misconception("nothing is divided", "A rank holds its part of its stage.", lambda m, tp, pp, dp: m.total),
        Misconception("the answer is in GB", "The function returns bytes: 1 GB is 1e9.",
            lambda m, tp, pp, dp: _fullest(m, tp, pp, dp) / GB),
    ),
    hints=(
        "Which of the three degrees cut the model, and which only the requests?",
        "A replica is tp x pp ranks, and they hold the model once between them.",
        "model.total / (tp * pp).",
    ),
    moral="tp x pp ranks hold the model once, whichever way they are arranged; replicas hold it again.",
)  # fmt: skip


# -- time per token, on paper ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """What a time per token depends on, of one kind of GPU, of its links, and of the program that serves.

    bandwidth_gbs: of its memory, as in the datasheet; efficiency: the part of it that reading weights reaches. layer_us: what a
    layer costs besides, on every rank. link_gbs: of the link, per direction. all_reduce_us: by tp, the time in which one token's
    hidden vector is added up. hop_us: the same vector's way to the next stage, and a sampled token's way back.
    """

    bandwidth_gbs: float
    efficiency: float
    layer_us: float
    link_gbs: float
    all_reduce_us: Mapping[int, float]
    hop_us: float
    spec: str  # as for labkit.predict.hardware


@lru_cache(maxsize=256)
def gpu(spec: str, hidden: int = LLAMA_70B.hidden) -> Gpu:
    """A GPU as the cost model has it, for hidden vectors of that many numbers in 16 bits."""
    hw, typical = hw_.hardware(spec), engine("typical")
    reduce = {tp: hw_.all_reduce(hw, typical.name, tp, 2 * hidden).seconds * 1e6 for tp in (1, 2, 4, 8)}
    layer = typical.layer_us + typical.sequence_us
    hop = hw_.hop(hw, 2 * hidden, False).seconds * 1e6
    return Gpu(hw.bandwidth_gbs, typical.bandwidth, layer, hw.link_gbs, reduce, hop, spec)


def _decode(model: Shape, tp: int, pp: int, on: Gpu) -> float:
    """ms, by the cost model."""
    fields = asdict(model) | {"name": "model", "max_positions": 2**31}
    del fields["bytes_per_param"]
    load = Load(batch=1, context=1, kv_dtype="bfloat16")
    at = Deployment(sizes.Shape(**fields), hw_.hardware(on.spec), engine("typical"), Layout(tp, pp), load)
    return at.decode().seconds * 1e3


def _terms(
    model: Shape, tp: int, pp: int, on: Gpu, *, share: float | None = None, efficiency: float | None = None,
    calls: float = 2, each_us: float | None = None, layers: float = 1,
) -> float:  # fmt: skip
    """The formula on paper, but for what is passed in: weights, exchanges, layers, hops."""
    weights = model.total / (share or tp) / (on.bandwidth_gbs * (efficiency or on.efficiency)) / 1e6
    each = on.all_reduce_us[tp] if each_us is None else each_us
    exchanges = 0.0 if tp == 1 else calls * model.layers * each
    return weights + (exchanges + layers * model.layers * on.layer_us + (on.hop_us * pp if pp > 1 else 0)) / 1e3


def _by_bandwidth(model: Shape, tp: int, pp: int, on: Gpu) -> float:
    wire = 2 * (tp - 1) / tp * model.hidden * model.bytes_per_param
    return _terms(model, tp, pp, on, each_us=wire / on.link_gbs / 1e3)


def _latency_cases(rng: random.Random) -> list[Case]:
    """The 70B model at TP=2 and TP=4 with links of 100 GB/s, and random models, GPUs, links and degrees."""

    def draw() -> list[Case]:
        given = gpu("h100-sxm,link_gbs=100")
        asked = [(LLAMA_70B, 2, 1, given, "h100-sxm"), (LLAMA_70B, 4, 1, given, "h100-sxm")]
        for tp, pp in ((8, 1), (2, 2), (rng.choice((1, 4)), 4)):
            name, heads = rng.choice(("a100-80gb", "h100-sxm", "h200", "b200")), rng.choice((32, 64))
            link = rng.choice((50, 100, 200, 300))
            model = Shape(rng.randrange(48, 97, 16), heads * 128, heads * 448, heads, 8, 128, 32000, False, 2)
            asked.append((model, tp, pp, gpu(f"{name},link_gbs={link}", model.hidden), name))
        return [
            Case((m, tp, pp, on), f"{m}, tp={tp}, pp={pp}, {name} with {on.link_gbs:g} GB/s")
            for m, tp, pp, on, name in asked
        ]

    return distinct(lambda: TIME, draw)


TIME = Exercise(
    name="planning.time_per_token",
    call="time_per_token(model, tp, pp, gpu)",
    cases=_latency_cases,
    reference=_decode,
    points=2,
    unit=("ms", 1.0),
    tolerance=0.03,
    misconceptions=(
        Misconception("tp all-reduces are counted in each layer",
            "There are two in each layer, after attention and after the MLP, at any degree: 2, not 8, at TP=8.",
            lambda m, tp, pp, on: _terms(m, tp, pp, on, calls=tp)),
        Misconception("one all-reduce is counted in each layer",
            "There are two: one after attention's output projection, one after the MLP's down projection.",
            lambda m, tp, pp, on: _terms(m, tp, pp, on, calls=1)),
        Misconception("an all-reduce is taken to last bytes / bandwidth, or all of them are left out",
            "One hidden vector is 16 kB or less: at 100 GB/s its bytes take a fraction of a microsecond, which is as good as "
            "nothing. What takes time is latency, which no bandwidth mends: use all_reduce_us.", _by_bandwidth),
        Misconception("the stages are taken to work on the token at the same time",
            "A token passes one stage after the other, and together they read as much as one rank would: a pipeline "
            "doesn't make one request's decode faster.",
            lambda m, tp, pp, on: _terms(m, tp, pp, on, share=tp * pp)),
        Misconception("the weights are not divided by tp", "Each of tp ranks reads its own part, at the same time.",
            lambda m, tp, pp, on: _terms(m, tp, pp, on, share=1)),
        Misconception("each layer's fixed cost is left out",
            "Launches, norms and small operations cost the same at every degree. A roofline without them promises "
            "speed-ups that do not come.", lambda m, tp, pp, on: _terms(m, tp, pp, on, layers=0)),
        Misconception("each layer's fixed cost is divided by tp",
            "Every rank goes through every layer of its stage, with a part of its width: the fixed cost stays.",
            lambda m, tp, pp, on: _terms(m, tp, pp, on, layers=1 / tp)),
        Misconception("memory is read at the datasheet's bandwidth",
            "No program reaches it: multiply by gpu.efficiency.", lambda m, tp, pp, on: _terms(m, tp, pp, on, efficiency=1.0)),
        Misconception("the answer is in seconds", "Milliseconds are asked for.",
            lambda m, tp, pp, on: _decode(m, tp, pp, on) / 1e3),
        Misconception("the answer is in microseconds", "Milliseconds are asked for.",
            lambda m, tp, pp, on: _decode(m, tp, pp, on) * 1e3),
    ),
    hints=(
        "Four terms: reading weights, all-reduces, each layer's fixed cost, hops between stages. Which of them does tp make "
        "smaller, which does pp?",
        "weights: model.total / tp bytes at gpu.bandwidth_gbs * gpu.efficiency. All-reduces: two in each layer, none at tp=1. "
        "Layers: all of them pass. Hops: pp, if there is more than one stage.",
        "ms = model.total / tp / (gpu.bandwidth_gbs * gpu.efficiency * 1e6) + ((tp > 1) * 2 * model.layers * "
        "gpu.all_reduce_us[tp] + model.layers * gpu.layer_us + (pp > 1) * pp * gpu.hop_us) / 1e3.",
    ),
    moral="Only the first term falls with tp; the second comes with it, the third stays, and a pipeline divides nothing here.",
)  # fmt: skip


# -- a layout ----------------------------------------------------------------------------------------------------------

Setting = tuple[str, str, int, int, int]  # model, hardware, GPUs, sequences, tokens of each
Choice = tuple[int, int, int]  # tp, pp, dp
CLEAR = 1.01  # how many times as slow the second best must be


@lru_cache(maxsize=1024)
def _planned(*setting: Any) -> dict[str, Any]:
    model, on, gpus, batch, context = setting
    return plan(model, on, gpus=gpus, batch=batch, context=context)


def _degrees(layout: Mapping[str, int]) -> Choice:
    return layout["tp"], layout["pp"], layout["dp"]


def _best(*setting: Any) -> Choice:
    return _degrees(_planned(*setting)["recommended"]["layout"])


@lru_cache(maxsize=4096)
def _told(setting: Setting, tp: int, pp: int, dp: int) -> dict[str, Any]:
    model, on, _, batch, context = setting
    return predict(model, on, tp=tp, pp=pp, dp=dp, batch=batch, context=context)


def _fastest(
    fits: Callable[[Mapping[str, Any]], bool], cost: Callable[[Mapping[str, Any], Choice], float] | None = None
) -> Callable[..., Choice]:
    """A planner that thinks a layout fits where `fits(memory)` says so, and takes the one with the lowest `cost`."""

    def choose(*setting: Any) -> Choice:
        rows = {
            _degrees(row["layout"]): _told(setting, *_degrees(row["layout"])) for row in _planned(*setting)["layouts"]
        }
        enough = {at: told for at, told in rows.items() if fits(told["memory"])}
        return min(enough, key=lambda at: cost(enough[at], at) if cost else enough[at]["tpot_ms"])

    return choose


def _fixed(tp: Callable[[int, int], int]) -> Callable[..., Choice]:
    """A rule of thumb: tp from the number of GPUs and the GPUs of a node, stages for the rest."""

    def choose(model: str, on: str, gpus: int, batch: int, context: int) -> Choice:
        degree = tp(gpus, hw_.hardware(on).node_gpus)
        return degree, gpus // degree, 1

    return choose


def _throughput(*setting: Any) -> Choice:
    rows = [row for row in _planned(*setting)["layouts"] if row["fits"]]
    return _degrees(max(rows, key=lambda row: row["max_tokens_per_s"])["layout"])


def _most_replicas(*setting: Any) -> Choice:
    fitting = [_degrees(row["layout"]) for row in _planned(*setting)["layouts"] if row["fits"]]
    return max(fitting, key=lambda at: (at[2], at[0]))


def _choose_cases(rng: random.Random) -> list[Case]:
    """405B on 16 GPUs; the same with a slow network between servers; cards without NVLink, with many sequences; a small model."""

    def slots() -> list[Setting]:
        slow, seventy = rng.choice((1, 2, 3)), rng.choice(("llama-2-70b", "llama-3.1-70b", "qwen2.5-72b"))
        return [
            ("llama-3.1-405b", "h100-sxm", 16, rng.choice((1, 2, 4)), rng.choice((2048, 3000))),
            ("llama-3.1-405b", f"h100-sxm,internode_gbs={slow}", 16, rng.choice((48, 64)), 4000),
            (seventy, rng.choice(("a100-80gb-pcie", "h100-pcie")), 8, rng.randrange(190, 250, 5), 4000),
            ("llama-3.1-8b", rng.choice(("l4", "rtx-4090")), 8, rng.choice((16, 32, 48, 64)), 2000),
        ]

    def draw() -> list[Case]:
        settings: list[Setting] = []
        while len(settings) < 4:
            setting = slots()[len(settings)]
            rows = [row["tpot_ms"] for row in _planned(*setting)["layouts"] if row["fits"]]
            if len(rows) > 1 and rows[1] > CLEAR * rows[0]:
                settings.append(setting)
        return [Case(at, f"{at[0]} on {at[2]} x {at[1]}, {at[3]} sequences of {at[4]} tokens") for at in settings]

    return distinct(lambda: CHOOSE, draw)


CHOOSE = Exercise(
    name="planning.choose",
    call="choose(model, hardware, gpus, batch, context)",
    cases=_choose_cases,
    reference=_best,
    points=3,
    tolerance=1e-6,
    misconceptions=(
        Misconception("tensor parallelism is spread over all GPUs, whatever joins them",
            "Two all-reduces in each layer wait for the slowest link among them, and all tokens of a step must cross it.",
            _fixed(lambda gpus, node: gpus)),
        Misconception("tensor parallelism is spread over a whole server, and never further (8 is a limit)",
            "Eight is how many GPUs a server has. Across servers exchanges are slower, and for few sequences it can still pay; "
            "on cards without NVLink less than eight may be better. Compare the times.",
            _fixed(lambda gpus, node: min(gpus, node))),
        Misconception("TP=2 is taken for the best balance, and stages for the rest",
            "A token then reads half of each stage's weights, one stage after the other: at one request nothing is shared out "
            "but by two.", _fixed(lambda gpus, node: 2)),
        Misconception("stages are taken to divide the time of a token",
            "They work on it one after the other. A pipeline needs less memory and sends little; a token isn't faster for it.",
            _fixed(lambda gpus, node: 1)),
        Misconception("as many replicas are made as fit",
            "Each of them reads all weights for its part of the sequences. That is good for throughput at best.", _most_replicas),
        Misconception("it isn't looked at whether the layout fits",
            'Weights, KV cache and activations must fit: predict(...)["memory"]["fits"].', _fastest(lambda memory: True)),
        Misconception("only the weights are taken to need room",
            "The KV cache of all sequences and the activations lie beside them.",
            _fastest(lambda memory: memory["weights_gb"] <= memory["usable_gb"])),
        Misconception("the layout for the highest throughput is chosen",
            "Asked for is the shortest time per token with this batch, not the most tokens/s with a full memory.", _throughput),
        Misconception("the degrees are handed in as (pp, tp, dp)", "The order is (tp, pp, dp).",
            lambda *setting: (_best(*setting)[1], _best(*setting)[0], _best(*setting)[2])),
    ),
    hints=(
        "Which layouts are there? tp x pp x dp is the number of GPUs: try them all, and let `predict` say what each would do.",
        'predict(model, hardware, tp=tp, pp=pp, dp=dp, batch=batch, context=context) returns "memory", which has "fits", and '
        '"tpot_ms". Of those that fit take the fastest.',
        "degrees = [n for n in range(1, gpus + 1) if gpus % n == 0]; for each tp, pp of them with gpus % (tp * pp) == 0 and "
        'dp = gpus // tp // pp: told = predict(...); keep (told["tpot_ms"], (tp, pp, dp)) if told["memory"]["fits"]; return '
        "min(kept)[1].",
    ),
    moral="No rule of thumb gives all of these: what fits, and what each exchange costs on this link, decide together.",
)  # fmt: skip

EXERCISES = (HYBRID, TIME, CHOOSE)
