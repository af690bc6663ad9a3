"""The time of a token and of a prompt, and the memory of a GPU, for any layout: sums of named terms, each with its source.

A pass of some tokens through a pipeline stage takes

    max(reading weights, products) + max(reading K and V, scores) + layers x (a + b x sequences) + exchanges

which is the roofline (Williams et al. 2009, doi:10.1145/1498765.1498785) and what it leaves out: a fixed cost per layer of
launches, norms and whatever doesn't fill a GPU. Bandwidths and rates are the datasheet's (`labkit.predict.hardware`) times an
efficiency; efficiencies and fixed costs are an engine's (engines.json), fitted by `labkit.predict.calibrate` on published
measurements of few GPUs and tried on those of more. Exchanges come from measured tables. Around that, a pipeline waits for
its slowest stage and experts for their busiest rank.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from labkit import split
from labkit.mesh import Layout
from labkit.model.errors import ModelError
from labkit.predict import hardware as hw_
from labkit.predict.hardware import HERE, Hardware, hardware
from labkit.predict.shape import WEIGHT_BYTES, WEIGHT_ONLY, Shape, shape_of, stages

KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True)
class Engine:
    """What a serving program makes of its hardware.

    bandwidth, arithmetic: the part of the memory's bandwidth, and of the rate that large products attain, that it reaches.
    layer_us, moe_layer_us: fixed cost of a layer, and what one with experts costs more. sequence_us: of each sequence in each
    layer. weight_only: the part of the bandwidth left for weights that must be widened first, by dtype. head: whether the
    embedding and the output head are cut over tp. fp8_cache: whether K and V are in fp8 where weights are. source: what it was
    fitted on.
    """

    name: str
    bandwidth: float
    arithmetic: float
    layer_us: float
    sequence_us: float
    moe_layer_us: float
    weight_only: Mapping[str, float]
    head: bool
    fp8_cache: bool
    source: str


@cache
def engines() -> dict[str, Engine]:
    """The engines of engines.json, by name."""
    return {name: Engine(name, **values) for name, values in json.loads((HERE / "engines.json").read_text())["engines"].items()}


def engine(name: str) -> Engine:
    if name not in engines():
        raise ValueError(f"no engine {name!r}: use {', '.join(engines())}")
    return engines()[name]


@dataclass(frozen=True)
class Load:
    """What is asked: `batch` sequences in flight over all replicas, each with `context` tokens in the cache; weights and cache in
    which numbers; prompt: tokens of a prompt; step: of one prefill pass, at most; prompt_tokens_per_token: how many prompt tokens
    a server under load computes for each token that it generates.

    imbalance: load of the busiest expert-parallel rank over the mean; None: what chance makes of even routing.
    """

    batch: int = 1
    context: float = 2048
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    prompt: int = 2048
    step: int = 8192
    prompt_tokens_per_token: float = 0.0
    imbalance: float | None = None


@dataclass(frozen=True)
class Term:
    name: str
    seconds: float
    source: str


class Terms(dict[str, Term]):
    """Terms by name; those of one name are added up."""

    def put(self, name: str, seconds: float, source: str) -> None:
        before = self[name].seconds if name in self else 0.0
        self[name] = Term(name, before + seconds, source)

    def add(self, other: "Terms", times: float = 1.0) -> "Terms":
        for term in other.values():
            self.put(term.name, term.seconds * times, term.source)
        return self

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.values())


@dataclass(frozen=True)
class Deployment:
    """A model on hardware in a layout, served by an engine."""

    shape: Shape
    hw: Hardware
    engine: Engine
    layout: Layout
    load: Load

    @property
    def sequences(self) -> int:
        """In flight on the fullest replica."""
        return -(-self.load.batch // self.layout.dp)

    @property
    def lanes(self) -> int:
        """Micro-batches that take turns on the stages."""
        return min(self.layout.pp, self.sequences)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def weights(self, stage: int, rank: int = 0) -> float:
        """Bytes of weights on the `rank`-th tensor-parallel rank of a stage. With expert parallelism, of the fullest replica's."""
        tp, shape = self.layout.tp, self.shape
        matrices = vectors = 0
        for layer in stages(shape, self.layout.pp)[stage]:
            matrices += shape.attention(tp, rank)
            vectors += shape.attention_vectors(tp, rank)
            if shape.moe and shape.sparse(layer):
                held, width_tp = self._experts_held(rank), 1 if self.layout.ep > 1 else tp
                matrices += held * shape.mlp(width_tp, rank if width_tp > 1 else 0, shape.moe.width)
                matrices += shape.mlp(tp, rank, shape.shared_width)
                vectors += shape.moe.experts * shape.hidden
            else:
                matrices += shape.mlp(tp, rank, shape.intermediate)
                vectors += shape.mlp_vectors(tp, rank)
        first, last = stage == 0, stage == self.layout.pp - 1
        table = self._vocabulary(rank) * shape.hidden
        wide = WEIGHT_BYTES[self._wide]
        total = matrices * WEIGHT_BYTES[self.load.dtype] + vectors * wide
        if first:
            total += table * wide
        if last:
            total += (0 if first and shape.tied else table * self._head_bytes) + shape.hidden * wide
        return total

    def kv_bytes_per_token(self, stage: int, rank: int = 0) -> int:
        layers = len(stages(self.shape, self.layout.pp)[stage])
        return layers * self.shape.kv_numbers(self.layout.tp, rank) * KV_BYTES[self.load.kv_dtype]

    def kv(self, stage: int, rank: int = 0) -> float:
        """Bytes of the cache for every sequence of the fullest replica, in blocks of 16 tokens."""
        tokens = -(-self.load.context // 16) * 16 * self.sequences
        return tokens * self.kv_bytes_per_token(stage, rank)

    def activations(self, stage: int) -> float:
        """Bytes, about, of what a prefill pass needs at once besides: the residual twice, its norm, and the widest of what a
        layer makes of it; logits of each sequence in float32 twice."""
        tp, shape = self.layout.tp, self.shape
        tokens, wide = min(self.load.step, self.load.prompt * self.sequences), WEIGHT_BYTES[self._wide]
        per_token = 3 * shape.intermediate / tp + shape.hidden
        if shape.moe:
            rows = shape.moe.per_token * (self.layout.dp if self.layout.ep > 1 else 1) / self.layout.ep
            width = shape.moe.width / (1 if self.layout.ep > 1 else tp)
            per_token = max(per_token, rows * (shape.hidden * 3 + 3 * width))
        total = tokens * (3 * shape.hidden + per_token) * wide
        if stage == self.layout.pp - 1:
            total += 2 * 4 * self.sequences * self._vocabulary(0)
        return total

    @property
    def _wide(self) -> str:
        """What is not quantised is in 16 bits."""
        return self.load.dtype if self.load.dtype in ("float32", "float16") else "bfloat16"

    @property
    def _residual(self) -> int:
        """Bytes of a number of the residual, which ranks exchange."""
        return 4 if self.load.dtype == "float32" else 2

    @property
    def _head_bytes(self) -> float:
        return WEIGHT_BYTES[self.load.dtype if self.load.dtype in WEIGHT_ONLY else self._wide]

    def _vocabulary(self, rank: int) -> int:
        return len(split.even(self.shape.vocab, self.layout.tp)[rank]) if self.engine.head else self.shape.vocab

    def _experts_held(self, rank: int) -> int:
        assert self.shape.moe
        return len(split.even(self.shape.moe.experts, self.layout.ep)[rank]) if self.layout.ep > 1 else self.shape.moe.experts

    # -- one pass of one stage -----------------------------------------------------------------------------------------

    def stage(self, stage: int, tokens: int, sequences: int, kv_tokens: float, pairs: float) -> Terms:
        """Terms of a pass over `tokens` of `sequences`, which reads the K and V of `kv_tokens` and scores `pairs` of a query and a
        key; on the first tensor-parallel rank, which has no less than the others."""
        terms, shape, hw, engine, layout = Terms(), self.shape, self.hw, self.engine, self.layout
        tp, dtype = layout.tp, self.load.dtype
        layers = stages(shape, layout.pp)[stage]
        efficiency = engine.bandwidth * engine.weight_only.get(dtype, 1.0)
        bandwidth, rate = efficiency * hw.bandwidth_gbs * 1e9, engine.arithmetic * hw.attained * hw.tflops(dtype) * 1e12
        sparse = sum(shape.sparse(layer) for layer in layers)
        one = WEIGHT_BYTES[dtype]
        params: float = len(layers) * shape.attention(tp, 0) + (len(layers) - sparse) * shape.mlp(tp, 0, shape.intermediate)
        read, flops = params * one, 2 * params * tokens
        if stage == layout.pp - 1:
            table = self._vocabulary(0) * shape.hidden
            read, flops = read + table * self._head_bytes, flops + 2 * table * sequences
        expert_flops = 0.0
        if shape.moe and sparse:
            touched, expert_flops = self._experts(tokens)
            shared = shape.mlp(tp, 0, shape.shared_width)
            read += sparse * (touched * one + shared * one + shape.moe.experts * shape.hidden * 2)
            expert_flops *= sparse
            flops += expert_flops + sparse * 2 * shared * tokens
        reading = read / bandwidth
        datasheet = f"{hw.name} ({hw.source})"
        terms.put(
            "weights", reading,
            f"{read / 1e9:.4g} GB at {efficiency:.2f} ({engine.name}: {engine.source}) of {hw.bandwidth_gbs:g} GB/s, {datasheet}",
        )  # fmt: skip
        rates = f"{engine.arithmetic:.2f} ({engine.name}: {engine.source}) of {hw.attained:g} x {hw.tflops(dtype):g} TFLOP/s, {datasheet}"
        terms.put(
            "arithmetic beyond reading", max(0.0, flops / rate - reading), f"{flops / 1e12:.3g} TFLOP at {rates}"
        )
        kv_read = len(layers) * shape.kv_numbers(tp, 0) * KV_BYTES[self.load.kv_dtype] * kv_tokens
        kv_reading = kv_read / (engine.bandwidth * hw.bandwidth_gbs * 1e9)
        scores = len(layers) * shape.score_flops(tp, 0) * pairs / (engine.arithmetic * hw.attained * hw.bf16_tflops * 1e12)
        terms.put("KV cache", kv_reading, f"{kv_read / 1e9:.3g} GB at {engine.bandwidth:.2f} of {hw.bandwidth_gbs:g} GB/s")
        terms.put("attention scores beyond reading", max(0.0, scores - kv_reading), f"in 16 bits, at {rates}")
        fixed = len(layers) * engine.layer_us * 1e-6 + sparse * engine.moe_layer_us * 1e-6
        extra = f" and {engine.moe_layer_us:.1f} us for experts" if sparse else ""
        terms.put("layers", fixed, f"{engine.layer_us:.1f} us each{extra} ({engine.name}: {engine.source})")
        terms.put(
            "sequences", len(layers) * sequences * engine.sequence_us * 1e-6,
            f"{engine.sequence_us:.2f} us each and layer ({engine.name}: {engine.source})",
        )  # fmt: skip
        self._exchanges(terms, stage, tokens, sequences, len(layers), sparse, expert_flops / rate)
        return terms

    def _experts(self, tokens: int) -> tuple[float, float]:
        """Of one layer: expert parameters that a rank reads, of those experts that any token asks for if all are equally likely;
        and its operations."""
        moe, layout = self.shape.moe, self.layout
        assert moe
        together = tokens * (layout.dp if layout.ep > 1 else 1)
        asked = 1 - (1 - moe.per_token / moe.experts) ** together
        size = self.shape.mlp(1 if layout.ep > 1 else layout.tp, 0, moe.width)
        rows = together * moe.per_token / layout.ep
        return self._experts_held(0) * asked * size, 2 * size * rows

    def _exchanges(
        self, terms: Terms, stage: int, tokens: int, sequences: int, layers: int, sparse: int, experts: float
    ) -> None:
        """All that the ranks of a stage do together in a pass; experts: seconds of their arithmetic, of which the busiest rank
        has more."""
        shape, layout, hw = self.shape, self.layout, self.hw
        size = shape.hidden * self._residual
        tp = layout.tp
        if tp > 1:
            reduce = hw_.all_reduce(hw, self.engine.name, tp, tokens * size)
            count = 2 * layers - (sparse if layout.ep > 1 else 0)
            terms.put("all-reduce", count * reduce.seconds, f"{count} of {tokens * size:,} bytes; {reduce.source}")
            if self.engine.head and stage == 0:
                terms.put("embedding", reduce.seconds, f"one more; {reduce.source}")
            if self.engine.head and stage == layout.pp - 1:
                gather = hw_.gather(hw, tp, 16 * sequences)  # two numbers of each, as the engine here; others gather all logits
                terms.put("logits", gather.seconds, gather.source)
        if not (sparse and layout.ep > 1 and shape.moe):
            return
        mine = -(-tokens // tp)
        numbers = mine * shape.moe.per_token * shape.hidden
        narrow = 1 + 4 / 128 if self.load.dtype == "fp8" else 2  # fp8 with a float32 scale for 128 numbers, as DeepEP sends it
        both = Terms()
        for op, width in (("dispatch", narrow), ("combine", 2)):
            exchange = hw_.expert_exchange(hw, op, layout.ep, numbers * width)
            both.put(f"expert {op}", sparse * exchange.seconds, f"{sparse} of {numbers * width:,.0f} bytes; {exchange.source}")
        terms.add(both)
        if tp > 1:
            gather = hw_.gather(hw, tp, mine * size)
            terms.put("expert results to tp ranks", sparse * gather.seconds, gather.source)
        rows = tokens * layout.dp * shape.moe.per_token / layout.ep
        busiest = self.load.imbalance or 1 + math.sqrt(2 * math.log(layout.ep) / max(rows, 1))
        why = "as given" if self.load.imbalance else f"of {rows:.3g} rows each, by chance: 1 + sqrt(2 ln {layout.ep} / rows)"
        terms.put("expert imbalance", (busiest - 1) * (both.seconds + experts), f"busiest rank over mean {busiest:.2f}, {why}")

    # -- tokens and prompts --------------------------------------------------------------------------------------------

    def decode(self) -> Terms:
        """Terms of one token of each sequence: what passes between two of its tokens."""
        load, pp = self.load, self.layout.pp
        micro = -(-self.sequences // self.lanes)
        attended = micro * self.shape.kv_tokens(load.context)
        kinds = self._kinds()
        each = {s: self.stage(s, micro, micro, attended, attended).add(self._prompts_between(s, micro)) for s in kinds}
        terms = Terms()
        for stage, count in kinds.items():
            terms.add(each[stage], count)
        if self.lanes == pp > 1:  # all stages are busy: a lane's turn comes when the slowest has served the others
            slowest = max(stage.seconds for stage in each.values())
            waiting = pp * slowest - terms.seconds
            terms.put("waiting for the slowest stage", waiting, f"{pp} stages, the slowest {slowest * 1e3:.3g} ms")
        return terms.add(self._hops(micro))

    def prefill(self) -> Terms:
        """Terms of one prompt alone, up to its first token."""
        chunks = -(-self.load.prompt // self.load.step)
        size = -(-self.load.prompt // chunks)
        kinds, terms = self._kinds(), Terms()
        for chunk in range(chunks):
            before = self.shape.kv_tokens(chunk * size)
            pairs = size * self.shape.kv_tokens((chunk + 0.5) * size)
            each = {s: self.stage(s, size, 1, before, pairs) for s in kinds}
            if chunk == 0:
                for stage, count in kinds.items():
                    terms.add(each[stage], count)
            else:  # chunks follow each other through the stages: a later one costs what the slowest stage takes
                terms.add(max(each.values(), key=lambda stage: stage.seconds))
        return terms.add(self._hops(size))

    def _prompts_between(self, stage: int, sequences: int) -> Terms:
        """Prompts of other sequences, computed between two tokens of one: they ride on passes that read the weights anyway."""
        load, shape, tp, terms = self.load, self.shape, self.layout.tp, Terms()
        count = load.prompt_tokens_per_token * sequences
        if not count:
            return terms
        layers, rate = stages(shape, self.layout.pp)[stage], self.engine.arithmetic * self.hw.attained * 1e12
        params = sum(shape.attention(tp, 0) + self._mlp_params(layer) for layer in layers)
        products = 2 * params * count / (rate * self.hw.tflops(load.dtype))
        pairs = count * shape.kv_tokens(load.prompt / 2)
        scores = len(layers) * shape.score_flops(tp, 0) * pairs / (rate * self.hw.bf16_tflops)
        source = f"{count:.4g} prompt tokens for each token of {sequences} sequences"
        terms.put("prompts of others", products + scores, source)
        size = min(load.step, load.prompt)
        chunk = self.stage(stage, size, 1, 0.0, 0.0)
        exchanges = sum(term.seconds for term in chunk.values() if term.name in EXCHANGES)
        terms.put("exchanges for prompts of others", exchanges / size * count, f"{source}, in passes of {size:,}")
        return terms

    def _mlp_params(self, layer: int) -> float:
        """Parameters of a layer's MLP or experts that a rank multiplies each token of its replica with."""
        shape, tp = self.shape, self.layout.tp
        if shape.moe and shape.sparse(layer):
            return shape.moe.per_token * shape.mlp(1, 0, shape.moe.width) / tp + shape.mlp(tp, 0, shape.shared_width)
        return shape.mlp(tp, 0, shape.intermediate)

    def _kinds(self) -> dict[int, int]:
        """A stage of each kind, by its layers and whether it is the first or last, and how many are like it."""
        seen: dict[tuple[int, int, bool, bool], int] = {}
        counts: dict[int, int] = {}
        for stage, layers in enumerate(stages(self.shape, self.layout.pp)):
            kind = len(layers), sum(map(self.shape.sparse, layers)), stage == 0, stage == self.layout.pp - 1
            first = seen.setdefault(kind, stage)
            counts[first] = counts.get(first, 0) + 1
        return counts

    def _hops(self, tokens: int) -> Terms:
        """Between stages, and the sampled ids back. Neighbouring stages are tp ranks apart."""
        terms, pp, tp, node = Terms(), self.layout.pp, self.layout.tp, self.hw.node_gpus
        if pp == 1:
            return terms
        payload = tokens * self.shape.hidden * self._residual
        across = sum(1 for s in range(pp - 1) if s * tp // node != (s + 1) * tp // node)
        for count, between in ((pp - 1 - across, False), (across, True)):
            if count:
                hop = hw_.hop(self.hw, payload, between)
                terms.put("pipeline hops", count * hop.seconds, f"{count} of {payload:,} bytes; {hop.source}")
        back = hw_.hop(self.hw, 8 * tokens, pp * tp > node)
        terms.put("sampled ids back", back.seconds, back.source)
        return terms


EXCHANGES = {
    "all-reduce", "embedding", "logits", "expert dispatch", "expert combine", "expert results to tp ranks", "pipeline hops",
    "sampled ids back",
}  # fmt: skip


def deployment(
    model: str, hardware_: str | Hardware, *, tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False,
    engine_: str = "vllm", load: Load | None = None,
) -> Deployment:  # fmt: skip
    """Checks that they fit together: raises ModelError, LayoutError or ValueError."""
    shape, layout, load = shape_of(model), Layout(tp=tp, pp=pp, dp=dp, expert_parallel=ep), load or Load()
    if ep and not shape.moe:
        raise ModelError(f"ep=True: {model} has no experts to spread")
    split.heads(shape.heads, shape.kv_heads, tp)
    split.layers(shape.layers, pp)
    if shape.moe and ep:
        split.experts(shape.moe.experts, layout.ep)
    if load.batch < 1 or load.context < 1 or load.prompt < 1:
        raise ValueError(f"batch={load.batch}, context={load.context:g}, prompt={load.prompt}: use 1 or more")
    chosen = engine(engine_)
    if load.kv_dtype == "auto":
        narrow = load.dtype == "fp8" and chosen.fp8_cache
        load = replace(load, kv_dtype="fp8" if narrow else "float32" if load.dtype == "float32" else "bfloat16")
    for name, value, legal in (("dtype", load.dtype, WEIGHT_BYTES), ("kv_dtype", load.kv_dtype, KV_BYTES)):
        if value not in legal:
            raise ValueError(f"{name}={value!r}: use {', '.join(legal)}")
    hw = hardware(hardware_) if isinstance(hardware_, str) else hardware_
    return Deployment(shape, hw, chosen, layout, load)
