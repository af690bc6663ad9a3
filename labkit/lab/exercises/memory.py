"""How much of a model one GPU holds. The references are counted in the engine's own decoder, made of fake tensors."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from operator import floordiv, truediv
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from labkit.engine.core import BLOCK
from labkit.lab.exercise import Case, Exercise, Misconception, distinct
from labkit.mesh import Layout
from labkit.model.config import ModelConfig
from labkit.model.decoder import Decoder
from labkit.model.shapes import SHAPES

GB = 1e9
_DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}
_BASE = ModelConfig.from_dict(SHAPES["llama-2-70b"])


@dataclass(frozen=True)
class Shape:
    """A decoder's shape: numbers of elements, and the bytes that each one takes, in weights and in the KV cache."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the output head is the embedding's matrix, held once
    bytes_per_param: int

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.hidden}, {self.heads} heads, {self.kv_heads} KV heads, {self.bytes_per_param} B"

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return counted(self, 1)[0]

    def config(self) -> tuple[ModelConfig, torch.dtype]:
        """What the engine makes a decoder of."""
        sizes = asdict(self)
        dtype = _DTYPES[sizes.pop("bytes_per_param")]
        return replace(_BASE, **sizes), dtype


LLAMA_70B = Shape(80, 8192, 28672, 64, 8, 128, 32000, False, 2)


class Stage(NamedTuple):
    """What the fullest rank of a pipeline stage holds: its number of layers, bytes of weights and of KV cache."""

    layers: int
    weights: int
    kv: int


@lru_cache(maxsize=256)
def stages(model: Shape, tp: int, pp: int, blocks: int, size: int) -> list[Stage]:
    """Each stage of the decoders that the engine would make for tp x pp ranks, with that many blocks of KV cache."""
    config, dtype = model.config()
    layout, device = Layout(tp=tp, pp=pp), torch.device("meta")
    out = []
    for stage in range(pp):
        held = []
        for rank in range(tp):
            # All that a decoder asks of its communication while it is made: no rank runs, no memory is taken.
            mesh = SimpleNamespace(
                layout=layout, device=device, pp_rank=stage, tp_rank=rank, size=lambda axis: getattr(layout, axis)
            )
            comm: Any = SimpleNamespace(mesh=mesh, device=device)
            decoder = Decoder(config, comm, dtype)
            held.append((decoder.weights_bytes, decoder.cache(blocks, size).bytes))
        weights, kv = (max(sizes) for sizes in zip(*held, strict=True))
        out.append(Stage(len(decoder.layers), weights, kv))
    return out


def counted(model: Shape, tp: int, context: int = 1, batch: int = 1) -> tuple[int, int]:
    """(bytes of weights, bytes of KV cache) on the fullest of `tp` ranks, in the decoder that the engine would make."""
    [whole] = stages(model, tp, 1, batch, context)
    return whole.weights, whole.kv


def _layouts(rng: random.Random) -> list[tuple[Shape, int]]:
    """Large and small, wide and narrow; in the last but one, the KV heads that are replicated are above the tolerance."""
    heads, vocab = rng.choice((16, 32)), rng.choice((32000, 128256))
    large = Shape(rng.choice((76, 80, 84)), 8192, 28672, 64, 8, 128, vocab, False, rng.choice((1, 2)))
    medium = Shape(rng.randrange(24, 41, 2), heads * 128, heads * 448, heads, 8, 128, 32000, False, 2)
    few_kv = Shape(rng.randrange(16, 33, 2), 2048, 5632, 16, rng.choice((1, 2)), 128, 32000, rng.random() < 0.5, 4)
    return [(LLAMA_70B, rng.choice((2, 4))), (large, 8), (medium, rng.choice((2, 4, 8))), (few_kv, 8), (few_kv, 1)]


def _weights_cases(rng: random.Random) -> list[Case]:
    return [Case((model, tp), f"{model}, tp={tp}") for model, tp in _layouts(rng)]


def _kv_cases(rng: random.Random) -> list[Case]:
    served = [(*layout, rng.choice((1000, 4096, 8192)), rng.randrange(3, 17)) for layout in _layouts(rng)]
    return [Case((m, tp, n, b), f"{m}, tp={tp}, context {n}, batch {b}") for m, tp, n, b in served]


def _seventy_cases(rng: random.Random) -> list[Case]:
    return [Case((tp,), f"Llama-2-70B in FP16, tp={tp}") for tp in (2, 4, 8)]


def _weights(model: Shape, tp: int) -> int:
    return counted(model, tp)[0]


def _cache(model: Shape, tp: int, context: int, batch: int) -> int:
    return counted(model, tp, context, batch)[1]


def _kv(m: Shape, context: int, batch: int, heads: float) -> float:
    return 2 * m.layers * heads * m.head_dim * m.bytes_per_param * context * batch


def _ends(m: Shape) -> int:
    return m.vocab * m.hidden * (1 if m.tied else 2) * m.bytes_per_param


def _seventy(tp: int) -> float:
    return _weights(LLAMA_70B, tp) / GB


_WHOLE = "Every rank would hold the whole model: that is data parallelism. Tensor parallelism cuts each matrix tp ways."
_TWICE = (
    "Tensor parallelism leaves every layer on every rank and cuts inside it; only pipeline stages share out layers."
)

SEVENTY_B = Exercise(
    name="memory.seventy_b",
    call="seventy_b(tp)",
    cases=_seventy_cases,
    reference=_seventy,
    unit=("GB", 1.0),
    misconceptions=(
        Misconception("the weights are not divided by tp", _WHOLE, lambda tp: _seventy(1)),
        Misconception("they are divided by tp twice, in width and in layers", _TWICE, lambda tp: _seventy(1) / tp**2),
        Misconception("a parameter takes one byte, or the share is halved once more",
            "FP16 takes 2 bytes: 140 GB in all, and each of tp ranks holds one share of it.", lambda tp: _seventy(tp) / 2),
        Misconception("a parameter takes 4 bytes", "That is FP32; FP16 takes 2.", lambda tp: _seventy(tp) * 2),
        Misconception("the answer is in bytes", "This one asks for GB: 1e9 bytes.", lambda tp: _seventy(tp) * GB),
        Misconception("the answer is in GiB", "This one asks for GB, not 2**30 bytes.", lambda tp: _seventy(tp) * GB / 2**30),
    ),
    hints=("How much is it in all, on one GPU?", "There are tp ranks, each with one share of every matrix.", "140 GB / tp."),
    moral="The shape that the engine counted has a little under 70 billion parameters; 140 / tp is within 2 %.",
)  # fmt: skip

PER_GPU = Exercise(
    name="memory.per_gpu",
    call="per_gpu(model, tp)",
    cases=_weights_cases,
    reference=_weights,
    unit=("GB", GB),
    points=2,
    misconceptions=(
        Misconception("the weights are not divided by tp", _WHOLE, lambda m, tp: _weights(m, 1)),
        Misconception("they are divided by tp twice, in width and in layers", _TWICE, lambda m, tp: _weights(m, 1) / tp**2),
        Misconception("they are divided by 2 x tp",
            "Each of tp ranks holds one share; the 2 in 2 x L counts all-reduces, not memory.",
            lambda m, tp: _weights(m, 1) / tp / 2),
        Misconception("every rank is given total / tp, KV heads included",
            "A rank needs a whole KV head to read. With tp above kv_heads each rank holds one, so these stop shrinking.",
            lambda m, tp: _weights(m, 1) / tp),
        Misconception("a parameter takes 4 bytes",
            "That is FP32; here it takes bytes_per_param.", lambda m, tp: _weights(m, tp) * 4 / m.bytes_per_param),
        Misconception("parameters are counted, not bytes",
            "Each parameter takes bytes_per_param bytes.", lambda m, tp: _weights(m, tp) / m.bytes_per_param),
        Misconception("the embedding and the output head are left out",
            "Both are matrices of vocab x hidden, cut over the ranks by vocabulary (one matrix if tied).",
            lambda m, tp: _weights(m, tp) - _ends(m) / tp),
        Misconception("the answer is in GB", "The function returns bytes: 1 GB is 1e9.", lambda m, tp: _weights(m, tp) / GB),
        Misconception("the answer is in GiB", "It should be in bytes; 1 GiB is 2**30.", lambda m, tp: _weights(m, tp) / 2**30),
    ),
    hints=(
        "Count one layer's parameters first: q and o have heads x head_dim columns or rows, k and v kv_heads x head_dim, the MLP "
        "has three matrices of hidden x intermediate. Then the ends: embedding and output head.",
        "Everything is cut tp ways, but a rank can't hold less than one KV head: count max(kv_heads / tp, 1) of them.",
        "layer = 2 * hidden * head_dim * (heads / tp + kv) + 3 * hidden * intermediate / tp, with kv from hint 2; "
        "ends = vocab * hidden / tp, twice unless tied; bytes = (layers * layer + ends) * bytes_per_param.",
    ),
    moral="Total / tp is close as long as tp <= kv_heads; above that, KV heads are replicated. So are norms, but they are tiny.",
)  # fmt: skip

KV_PER_GPU = Exercise(
    name="memory.kv_per_gpu",
    call="kv_per_gpu(model, tp, context, batch)",
    cases=_kv_cases,
    reference=_cache,
    unit=("GB", GB),
    points=2,
    misconceptions=(
        Misconception("K and V are counted as one",
            "Each token leaves two vectors in every layer, a key and a value.", lambda m, tp, n, b: _cache(m, tp, n, b) / 2),
        Misconception("query heads are counted instead of KV heads",
            "Queries are used once and thrown away. Keys and values stay, and with grouped-query attention they are fewer.",
            lambda m, tp, n, b: _kv(m, n, b, m.heads / tp)),
        Misconception("the cache goes on shrinking below one KV head per rank",
            "A rank's query heads must read a whole KV head: with tp above kv_heads, heads are replicated, not cut.",
            lambda m, tp, n, b: _kv(m, n, b, m.kv_heads / tp)),
        Misconception("it is not divided by tp",
            "KV heads are shared out over the ranks, like the heads that read them.",
            lambda m, tp, n, b: _kv(m, n, b, m.kv_heads)),
        Misconception("only one layer is counted",
            "Every layer keeps keys and values of its own.", lambda m, tp, n, b: _cache(m, tp, n, b) / m.layers),
        Misconception("only one sequence is counted",
            "Each sequence of the batch has its own keys and values.", lambda m, tp, n, b: _cache(m, tp, n, b) / b),
    ),
    hints=(
        "What does one token leave behind in one layer, on one rank? Multiply from there.",
        "Two vectors (K and V) for each KV head on this rank, head_dim numbers each, in every layer, for every token held.",
        "2 * layers * max(kv_heads / tp, 1) * head_dim * bytes_per_param * context * batch.",
    ),
    moral="The cache follows KV heads, context and batch; it shrinks with tp only down to one KV head per rank.",
)  # fmt: skip


# -- how many sequences fit --------------------------------------------------------------------------------------------


def _capacity(model: Shape, tp: int, layers: tuple[int, ...], free: tuple[int, ...], length: int) -> int:
    """Sequences that have their blocks on every rank, with blocks of the engine's own cache."""
    held = stages(model, tp, len(layers), 1, BLOCK)
    return min(room // stage.kv for room, stage in zip(free, held, strict=True)) // -(-length // BLOCK)


def _capacity_cases(rng: random.Random) -> list[Case]:
    """Stages with unequal numbers of layers too, and rooms for which the fullest stage isn't always the one with most layers."""

    def served(model: Shape, tp: int, pp: int, length: int) -> Case:
        held = stages(model, tp, pp, 1, BLOCK)
        memory = rng.randrange(11, 20) / 10 * max(stage.weights for stage in held)
        free = tuple(int(memory) - stage.weights for stage in held)
        layers = tuple(stage.layers for stage in held)
        rooms = ", ".join(f"{room / GB:.2f}" for room in free)
        return Case(
            (model, tp, layers, free, length), f"{model}, tp={tp}, layers {layers}, free GB {rooms}, length {length}"
        )

    def draw() -> list[Case]:
        (seventy, tp), _, (medium, _), (few_kv, _), _ = _layouts(rng)
        return [
            served(seventy, tp, rng.choice((3, 4)), rng.randrange(1000, 4000)),
            served(medium, 2, 1, rng.randrange(40, 100)),
            served(medium, 1, rng.choice((2, 3)), rng.randrange(200, 400)),
            served(few_kv, 8, 3, rng.randrange(40, 100)),
        ]

    return distinct(lambda: KV_CAPACITY, draw)


def _fit(
    model: Shape, tp: int, layers: Sequence[float], free: Sequence[float], length: int, *,
    kv_heads: Callable[[Shape, int], float] = lambda m, tp: max(m.kv_heads / tp, 1), vectors: int = 2,
    tokens: Callable[[int], float] = lambda length: -(-length // BLOCK) * BLOCK, itemsize: int | None = None,
    divided: Callable[[float, float], float] = floordiv, which: Callable[[list[float]], float] = min,
) -> float:  # fmt: skip
    """The right sum, `_capacity` without the engine, but for what is passed in."""
    row = vectors * kv_heads(model, tp) * model.head_dim * (itemsize or model.bytes_per_param)
    return which([divided(room, n * row * tokens(length)) for n, room in zip(layers, free, strict=True)])


_ON_EVERY_RANK = (
    "Each sequence needs its blocks on every rank, of its layers and heads: the one with the least room decides."
)

KV_CAPACITY = Exercise(
    name="memory.kv_capacity",
    call="kv_capacity(model, tp, layers, free, length)",
    cases=_capacity_cases,
    reference=_capacity,
    unit=("sequences", 1.0),
    points=2,
    tolerance=1e-6,  # to the sequence
    misconceptions=(
        Misconception("K and V are counted as one", "Each token leaves two vectors in every layer, a key and a value.",
            partial(_fit, vectors=1)),
        Misconception("query heads are counted instead of KV heads",
            "Queries are used once and thrown away. Keys and values stay, and with grouped-query attention they are fewer.",
            partial(_fit, kv_heads=lambda m, tp: m.heads / tp)),
        Misconception("the cache goes on shrinking below one KV head per rank",
            "A rank's query heads must read a whole KV head: with tp above kv_heads, heads are replicated, not cut.",
            partial(_fit, kv_heads=lambda m, tp: m.kv_heads / tp)),
        Misconception("every rank is given all KV heads", "They are shared out over tp ranks, like the heads that read them.",
            partial(_fit, kv_heads=lambda m, tp: m.kv_heads)),
        Misconception("every stage is given the cache of all layers",
            "A stage keeps keys and values of its own layers only: that is what a pipeline is for.",
            lambda m, tp, layers, *rest: _fit(m, tp, [sum(layers)] * len(layers), *rest)),
        Misconception("all stages are taken to have the same number of layers",
            "Not every number of layers can be shared out evenly: use layers[i].",
            lambda m, tp, layers, *rest: _fit(m, tp, [sum(layers) / len(layers)] * len(layers), *rest)),
        Misconception("only one layer is counted", "Every layer keeps keys and values of its own.",
            lambda m, tp, layers, *rest: _fit(m, tp, [1] * len(layers), *rest)),
        Misconception("only the first stage is looked at", _ON_EVERY_RANK,
            lambda m, tp, layers, free, length: _fit(m, tp, layers[:1], free[:1], length)),
        Misconception("only the last stage is looked at", _ON_EVERY_RANK,
            lambda m, tp, layers, free, length: _fit(m, tp, layers[-1:], free[-1:], length)),
        Misconception("the roomiest stage decides", _ON_EVERY_RANK, partial(_fit, which=max)),
        Misconception("what fits on the stages is added up", _ON_EVERY_RANK, partial(_fit, which=sum)),
        Misconception("the memory of all ranks is one pot",
            f"A rank can't lend its memory to another. {_ON_EVERY_RANK}",
            lambda m, tp, layers, free, length: _fit(m, 1, [sum(layers)], [tp * sum(free)], length)),
        Misconception("the length is not rounded up to whole blocks",
            "The last block of a sequence is its own, though not full: 17 tokens take two blocks of 16.",
            partial(_fit, tokens=lambda length: length)),
        Misconception("the length is rounded down to whole blocks", "Its last tokens need a block too.",
            partial(_fit, tokens=lambda length: length // BLOCK * BLOCK)),
        Misconception("tokens or blocks are counted, not sequences", "A sequence takes as many blocks as its length needs.",
            partial(_fit, tokens=lambda length: BLOCK)),
        Misconception("tokens or blocks are counted, not sequences", "A sequence takes as many blocks as its length needs.",
            partial(_fit, tokens=lambda length: 1)),
        Misconception("a number takes one byte", "It takes bytes_per_param bytes.", partial(_fit, itemsize=1)),
        Misconception("a part of a sequence is counted", "Round down, on each rank: a sequence fits or it doesn't.",
            partial(_fit, divided=truediv)),
    ),
    hints=(
        "How many bytes does one block of 16 tokens take on a rank of stage i? How many blocks does one sequence need?",
        "A rank's block: 16 tokens x 2 vectors x its KV heads x head_dim x bytes_per_param, in each of layers[i] layers. A "
        "sequence takes ceil(length / 16) of them, on every rank. Which rank is full first?",
        "kv = max(model.kv_heads / tp, 1); sequence = -(-length // 16) * 16 * 2 * kv * model.head_dim * model.bytes_per_param; "
        "int(min(room // (n * sequence) for n, room in zip(layers, free))).",
    ),
    moral="Whole blocks, whole KV heads, and the rank with the least room decides for all: the engine takes the minimum too.",
)  # fmt: skip

EXERCISES = (SEVENTY_B, PER_GPU, KV_PER_GPU, KV_CAPACITY)
