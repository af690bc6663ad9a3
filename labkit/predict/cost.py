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

# Of a GPU's memory; the rest is the driver's, the communication library's and lost between allocations. (vLLM's default.)
USABLE = 0.9
KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True)
class Engine:
    """What a serving program makes of its hardware.

    bandwidth, arithmetic: the part of the memory's bandwidth, and of the rate that large products attain, that it reaches.
    layer_us, moe_layer_us: fixed cost of a layer, and what one with experts costs more. sequence_us: of each sequence in each
    layer. weight_only: the part of the bandwidth left for weights that must be widened first, by dtype. head: where the output
    head is: "whole" on each rank of the last stage, cut over that one's ranks ("tp", as the embedding then is), or over those of
    all stages too ("all", as the engine here has it). fp8_cache: whether K and V are in fp8 where weights are. source: what
    it was fitted on.
    """

    name: str
    bandwidth: float
    arithmetic: float
    layer_us: float
    sequence_us: float
    moe_layer_us: float
    weight_only: Mapping[str, float]
    head: str
    fp8_cache: bool
    source: str


@cache
def engines() -> dict[str, Engine]:
    """The engines of engines.json, by name."""
    return {
        name: Engine(name, **values)
        for name, values in json.loads((HERE / "engines.json").read_text())["engines"].items()
    }


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
        """Bytes of weights on the `rank`-th tensor-parallel rank of a stage; of its experts, the most that a rank has."""
        tp, shape, layers = self.layout.tp, self.shape, stages(self.shape, self.layout.pp)[stage]
        sparse = sum(map(shape.sparse, layers))
        dense = len(layers) - sparse
        matrices = len(layers) * shape.attention(tp, rank) + dense * shape.mlp(tp, rank, shape.intermediate)
        vectors = len(layers) * shape.attention_vectors(tp, rank) + dense * shape.mlp_vectors(tp, rank)
        if shape.moe and sparse:
            whole = self.layout.ep > 1
            expert = shape.mlp(1, 0, shape.moe.width) if whole else shape.mlp(tp, rank, shape.moe.width)
            matrices += sparse * (self._experts_held(rank) * expert + shape.mlp(tp, rank, shape.shared_width))
            vectors += sparse * shape.moe.experts * shape.hidden
        wide = WEIGHT_BYTES[self._wide]
        total = matrices * WEIGHT_BYTES[self.load.dtype] + vectors * wide
        head = self._vocabulary(rank)
        if stage == 0:
            total += sum(map(len, head)) * shape.hidden * wide
        if stage or not shape.tied:  # the first has a tied one's rows in its embedding
            total += len(head[stage]) * shape.hidden * self._head_bytes
        return total + (shape.hidden * wide if stage == self.layout.pp - 1 else 0)

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
        return total + 2 * 4 * self.sequences * len(self._vocabulary(0)[stage])

    def memory(self) -> dict[str, Any]:
        """What the fullest GPU holds, in GB, and whether that is within `USABLE` of its memory."""
        ranks = [(stage, rank) for stage in self.kinds() for rank in self._shares()]
        parts = {(s, r): (self.weights(s, r), self.kv(s, r), self.activations(s)) for s, r in ranks}
        stage, rank = max(parts, key=lambda at: sum(parts[at]))
        names = ("weights_gb", "kv_gb", "activations_gb")
        sizes = dict(zip(names, (size / 1e9 for size in parts[stage, rank]), strict=True))
        total = sum(sizes.values())
        limit = USABLE * self.hw.memory_gb
        return {**sizes, "total_gb": total, "usable_gb": limit, "fits": total <= limit, "stage": stage}

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

    def _vocabulary(self, rank: int) -> list[range]:
        """The rows of the output head on each stage; all together are those of the embedding."""
        tp, pp, where = self.layout.tp, self.layout.pp, self.engine.head
        if where == "all":
            return split.vocabulary(self.shape.vocab, tp, pp)[rank]
        last = range(self.shape.vocab) if where == "whole" else split.even(self.shape.vocab, tp)[rank]
        return [range(last.start, last.start)] * (pp - 1) + [last]

    def _experts_held(self, rank: int) -> int:
        assert self.shape.moe, "only models with experts ask"
        return (
            len(split.even(self.shape.moe.experts, self.layout.ep)[rank])
            if self.layout.ep > 1
            else self.shape.moe.experts
        )

    # -- one pass of one stage -----------------------------------------------------------------------------------------

    def stage(self, stage: int, tokens: float, sequences: float, kv_tokens: float, pairs: float) -> Terms:
        """Terms of a pass over `tokens` of `sequences` through a stage's layers. It reads the K and V of `kv_tokens` and scores
        `pairs` of a query and a key. On the first tensor-parallel rank, which has no less than the others."""
        terms, shape, engine, tp = Terms(), self.shape, self.engine, self.layout.tp
        layers = stages(shape, self.layout.pp)[stage]
        sparse = sum(map(shape.sparse, layers))
        read, flops, experts = self._work(stage, tokens)
        bandwidth, source = self._reading(self.load.dtype)
        # As long as the weights take to come, or as the arithmetic takes, whichever is longer.
        terms.put("weights", read / bandwidth, f"{read / 1e9:.4g} GB at {source}")
        rate, source = self._arithmetic(self.load.dtype)
        beyond = max(0.0, flops / rate - read / bandwidth)
        terms.put("arithmetic beyond reading", beyond, f"{flops / 1e12:.3g} TFLOP at {source}")
        kv_read = len(layers) * shape.kv_numbers(tp, 0) * KV_BYTES[self.load.kv_dtype] * kv_tokens
        kv_rate, kv_source = self._reading("")
        terms.put("KV cache", kv_read / kv_rate, f"{kv_read / 1e9:.3g} GB at {kv_source}")
        score_rate, score_source = self._arithmetic("bfloat16")
        scores = len(layers) * shape.score_flops(tp, 0) * pairs / score_rate
        beyond = max(0.0, scores - kv_read / kv_rate)
        terms.put("attention scores beyond reading", beyond, f"in 16 bits, at {score_source}")
        by = f"(engine {engine.name})"
        terms.put("layers", len(layers) * engine.layer_us * 1e-6, f"{engine.layer_us:.1f} us each {by}")
        if sparse:
            terms.put("routers", sparse * engine.moe_layer_us * 1e-6, f"{engine.moe_layer_us:.1f} us each {by}")
        each = len(layers) * sequences * engine.sequence_us * 1e-6
        terms.put("sequences", each, f"{engine.sequence_us:.2f} us each and layer {by}")
        self._exchanges(terms, stage, tokens, sparse)
        if sparse and self.layout.ep > 1:
            self._expert_exchanges(terms, tokens, sparse, experts / rate)
        return terms

    def head(self, sequences: float) -> Terms:
        """Terms of choosing the next token of `sequences`, on each stage that has a part of the output head."""
        terms, layout, read = Terms(), self.layout, self.head_read
        flops = 2 * read / self._head_bytes * sequences
        (bandwidth, source), (rate, _) = self._reading(self.load.dtype), self._arithmetic(self.load.dtype)
        terms.put("output head", max(read / bandwidth, flops / rate), f"{read / 1e9:.4g} GB at {source}")
        # Two numbers of each rank and sequence, as in the engine here; others gather all logits.
        if self.engine.head != "whole" and layout.tp > 1:
            gather = hw_.gather(self.hw, self.engine.name, layout.tp, 16 * sequences)
            terms.put("logits", gather.seconds, gather.source)
        if layout.pp > 1:  # hidden states for the head to all stages, and two numbers from each; or the ids back
            sizes = (self.shape.hidden * self._residual, 16) if self.engine.head == "all" else (8,)
            hops = [hw_.hop(self.hw, size * sequences, layout.world > self.hw.node_gpus * layout.dp) for size in sizes]
            terms.put("choice to all stages", sum(hop.seconds for hop in hops), hops[0].source)
        return terms

    @property
    def head_read(self) -> float:
        """Bytes of the output head on a rank of the last stage."""
        return len(self._vocabulary(0)[-1]) * self.shape.hidden * self._head_bytes

    def _work(self, stage: int, tokens: float) -> tuple[float, float, float]:
        """Of a pass: bytes of weights that are read, operations of matrix products, and of these the experts'."""
        shape, tp, layers = self.shape, self.layout.tp, stages(self.shape, self.layout.pp)[stage]
        one = WEIGHT_BYTES[self.load.dtype]
        sparse = sum(map(shape.sparse, layers))
        params = len(layers) * shape.attention(tp, 0) + (len(layers) - sparse) * shape.mlp(tp, 0, shape.intermediate)
        params += sparse * shape.mlp(tp, 0, shape.shared_width)
        read, flops, experts = params * one, 2.0 * params * tokens, 0.0
        if shape.moe and sparse:
            touched, each = self._experts(tokens)
            experts = sparse * each
            read += sparse * (touched * one + shape.moe.experts * shape.hidden * 2)
        return read, flops + experts, experts

    def _reading(self, dtype: str) -> tuple[float, str]:
        """Bytes per second at which weights in `dtype` come, or, for "", what is used as it is; and a source."""
        part = self.engine.bandwidth * self.engine.weight_only.get(dtype, 1.0)
        source = f"{part:.2f} (engine {self.engine.name}) of {self.hw.bandwidth_gbs:g} GB/s ({self.hw.name})"
        return part * self.hw.bandwidth_gbs * 1e9, source

    def _arithmetic(self, dtype: str) -> tuple[float, str]:
        """Operations per second of matrix products, and a source."""
        part, hw = self.engine.arithmetic, self.hw
        peak = hw.attained * hw.tflops(dtype)
        source = (
            f"{part:.2f} ({self.engine.name}: {self.engine.source}) of {hw.attained:g} x {hw.tflops(dtype):g} TFLOP/s"
        )
        return part * peak * 1e12, f"{source} ({hw.source})"

    def _experts(self, tokens: float) -> tuple[float, float]:
        """Of one layer: expert parameters that a rank reads, of those experts that any token asks for if all are equally likely;
        and its operations."""
        moe, layout = self.shape.moe, self.layout
        assert moe, "only models with experts ask"
        together = tokens * (layout.dp if layout.ep > 1 else 1)
        asked = 1 - (1 - moe.per_token / moe.experts) ** together
        size = self.shape.mlp(1 if layout.ep > 1 else layout.tp, 0, moe.width)
        rows = together * moe.per_token / layout.ep
        return self._experts_held(0) * asked * size, 2 * size * rows

    def _exchanges(self, terms: Terms, stage: int, tokens: float, sparse: int) -> None:
        """All-reduces behind attention and dense MLPs, and of the embedding."""
        layout, hw, tp = self.layout, self.hw, self.layout.tp
        if tp == 1:
            return
        size = tokens * self.shape.hidden * self._residual
        reduce = hw_.all_reduce(hw, self.engine.name, tp, size)
        count = 2 * len(stages(self.shape, layout.pp)[stage]) - (sparse if layout.ep > 1 else 0)
        terms.put("all-reduce", count * reduce.seconds, f"{count} of {size:,} bytes; {reduce.source}")
        if self.engine.head != "whole" and stage == 0:
            terms.put("embedding", reduce.seconds, f"one more; {reduce.source}")

    def _expert_exchanges(self, terms: Terms, tokens: float, sparse: int, arithmetic: float) -> None:
        """Tokens to their experts and back; and what the busiest rank has more of, of that and of the experts' `arithmetic`."""
        moe, layout, hw, tp = self.shape.moe, self.layout, self.hw, self.layout.tp
        assert moe, "only models with experts ask"
        rows = tokens * layout.dp * moe.per_token / layout.ep
        busiest = self.load.imbalance or min(layout.ep, 1 + math.sqrt(2 * math.log(layout.ep) / max(rows, 1)))
        late = (busiest - 1) * arithmetic
        mine = -(-tokens // tp)
        numbers = mine * moe.per_token * self.shape.hidden
        narrow = (
            1 + 4 / 128 if self.load.dtype == "fp8" else 2
        )  # fp8 with a float32 scale for 128 numbers, as DeepEP sends it
        for op, width in (("dispatch", narrow), ("combine", 2)):
            even, more = (hw_.expert_exchange(hw, op, layout.ep, numbers * width * part) for part in (1, busiest))
            terms.put(f"expert {op}", sparse * even.seconds, f"{sparse} of {numbers * width:,.0f} bytes; {even.source}")
            late += sparse * (more.seconds - even.seconds)
        if tp > 1:
            gather = hw_.gather(hw, self.engine.name, tp, mine * self.shape.hidden * self._residual)
            terms.put("expert results to tp ranks", sparse * gather.seconds, gather.source)
        why = "as given" if self.load.imbalance else f"by chance: 1 + sqrt(2 ln {layout.ep} / {rows:.3g} rows)"
        terms.put("expert imbalance", late, f"busiest rank over mean {busiest:.2f}, {why}")

    def wire_bytes_per_token(self) -> float:
        """Bytes that the rank which sends most sends for a token of one sequence, in decode, as the engine here counts them
        (`labkit.comm`); to and from experts, what even routing makes on average."""
        shape, layout, tp, pp = self.shape, self.layout, self.layout.tp, self.layout.pp
        row = shape.hidden * self._residual
        reduce = 2 * (tp - 1) * row // tp
        most = 0.0
        for stage, layers in enumerate(stages(shape, pp)):
            sparse = sum(map(shape.sparse, layers)) if layout.ep > 1 else 0
            sent: float = (2 * len(layers) - sparse + (stage == 0)) * reduce + 16 * (tp - 1 + pp - 1)
            sent += row if pp > 1 else 0  # to the next stage; from the last one to all
            if sparse and shape.moe:
                chosen, experts, ep = shape.moe.per_token, shape.moe.experts, layout.ep
                missed = math.comb(experts - experts // ep, chosen) / math.comb(experts, chosen)
                sent += sparse * (
                    2 * (ep - 1) * (1 - missed) * row / tp + (ep - 1) * 8 * chosen / tp + (tp - 1) * row / tp
                )
            most = max(most, sent)
        return most

    # -- tokens and prompts --------------------------------------------------------------------------------------------

    def decode(self) -> Terms:
        """Terms of one token of each sequence: what passes between two of its tokens."""
        load, pp = self.load, self.layout.pp
        micro = -(-self.sequences // self.lanes)
        attended = micro * self.shape.kv_tokens(load.context)
        kinds = self.kinds()
        each = {s: self.stage(s, micro, micro, attended, attended).add(self._prompts_between(s, micro)) for s in kinds}
        terms = Terms()
        for stage, count in kinds.items():
            terms.add(each[stage], count)
        head, spread = self.head(micro), self.engine.head == "all"
        terms.add(head, self.lanes if spread else 1)  # all stages meet for it in each lane's turn, or the last has it
        if self.lanes == pp > 1:  # all stages are busy: a lane's turn comes when the slowest has served the others
            slowest = max(t.seconds + (head.seconds if spread or s == pp - 1 else 0.0) for s, t in each.items())
            waiting = pp * slowest - terms.seconds
            terms.put("waiting for the slowest stage", waiting, f"{pp} stages, the slowest {slowest * 1e3:.3g} ms")
        return terms.add(self._hops(micro))

    def prefill(self) -> Terms:
        """Terms of one prompt alone, up to its first token."""
        chunks = -(-self.load.prompt // self.load.step)
        size = -(-self.load.prompt // chunks)
        kinds, terms = self.kinds(), Terms()
        for chunk in range(chunks):
            before = self.shape.kv_tokens(chunk * size)
            pairs = size * self.shape.kv_tokens((chunk + 0.5) * size)
            each = {s: self.stage(s, size, 1, before, pairs) for s in kinds}
            if chunk == 0:
                for stage, count in kinds.items():
                    terms.add(each[stage], count)
            else:  # chunks follow each other through the stages: a later one costs what the slowest stage takes
                terms.add(max(each.values(), key=lambda stage: stage.seconds))
        return terms.add(self._hops(size)).add(self.head(1))

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

    def _shares(self) -> list[int]:
        """A tensor-parallel rank of each kind, by how much it has of what is cut."""
        shape, tp = self.shape, self.layout.tp
        heads = [(len(share.query), len(share.kv)) for share in split.heads(shape.heads, shape.kv_heads, tp)]
        widths = (shape.vocab, shape.intermediate, shape.shared_width, shape.moe.width if shape.moe else 0)
        parts = zip(heads, *(map(len, split.even(width, tp)) for width in widths), strict=True)
        return list({kind: rank for rank, kind in reversed(list(enumerate(parts)))}.values())

    def kinds(self) -> dict[int, int]:
        """A stage of each kind, by its layers and whether it is the first or last, and how many are like it."""
        seen: dict[tuple[int, int, bool, bool], int] = {}
        counts: dict[int, int] = {}
        for stage, layers in enumerate(stages(self.shape, self.layout.pp)):
            kind = len(layers), sum(map(self.shape.sparse, layers)), stage == 0, stage == self.layout.pp - 1
            first = seen.setdefault(kind, stage)
            counts[first] = counts.get(first, 0) + 1
        return counts

    def _hops(self, tokens: int) -> Terms:
        """Between stages. Neighbouring stages are tp ranks apart."""
        terms, pp, tp, node = Terms(), self.layout.pp, self.layout.tp, self.hw.node_gpus
        if pp == 1:
            return terms
        payload = tokens * self.shape.hidden * self._residual
        across = sum(1 for s in range(pp - 1) if s * tp // node != (s + 1) * tp // node)
        for count, between in ((pp - 1 - across, False), (across, True)):
            if count:
                hop = hw_.hop(self.hw, payload, between)
                terms.put("pipeline hops", count * hop.seconds, f"{count} of {payload:,} bytes; {hop.source}")
        return terms


EXCHANGES = {
    "all-reduce", "embedding", "logits", "expert dispatch", "expert combine", "expert results to tp ranks", "pipeline hops",
    "choice to all stages",
}  # fmt: skip


def deployment(
    model: str, hardware_: str | Hardware, *, tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False,
    engine_: str = "typical", load: Load | None = None,
) -> Deployment:  # fmt: skip
    """Checks that they fit together: raises ModelError, LayoutError or ValueError."""
    shape, layout, load = shape_of(model), Layout(tp=tp, pp=pp, dp=dp, expert_parallel=ep), load or Load()
    if ep and not shape.moe:
        raise ModelError(f"ep=True: {model} has no experts to spread")
    split.heads(shape.heads, shape.kv_heads, tp)
    stages(shape, pp)
    if shape.moe and ep:
        split.experts(shape.moe.experts, layout.ep)
    if load.batch < 1 or load.context < 1 or load.prompt < 1:
        raise ValueError(f"batch={load.batch}, context={load.context:g}, prompt={load.prompt}: use 1 or more")
    if hardware_ == "local":
        from labkit.predict import local

        return local.deployment(model, layout, load)
    chosen, load = engine(engine_), replace(load, dtype="bfloat16" if load.dtype == "auto" else load.dtype)
    if load.kv_dtype == "auto":
        narrow = load.dtype == "fp8" and chosen.fp8_cache
        load = replace(load, kv_dtype="fp8" if narrow else "float32" if load.dtype == "float32" else "bfloat16")
    for name, value, legal in (("dtype", load.dtype, WEIGHT_BYTES), ("kv_dtype", load.kv_dtype, KV_BYTES)):
        if value not in legal:
            raise ValueError(f"{name}={value!r}: use {', '.join(legal)}")
    hw = hardware(hardware_) if isinstance(hardware_, str) else hardware_
    return Deployment(shape, hw, chosen, layout, load)


def predict(
    model: str, hardware_: str | Hardware, *, tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False,
    engine_: str = "typical", batch: int = 1, context: int = 2048, dtype: str = "auto", kv_dtype: str = "auto",
    prompt: int | None = None, output: int | None = None, step: int = 8192, imbalance: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How fast a deployment would be.

    Args:
        model: a registered shape, a config.json, or what `LLM` takes. hardware_: as for `labkit.predict.hardware.hardware`, or
            "local", this machine (`labkit.predict.local`), which is measured first, in 20 to 40 seconds for each way to share it.
        batch: sequences in flight, in all replicas together. context: tokens that each has in the cache.
        dtype, kv_dtype: of weights and of the cache. "auto": 16 bits; of the cache, what the engine does.
        engine_: whose efficiencies and fixed costs (engines.json); "typical" was fitted on all engines together.
        prompt, output: tokens of each request to a server that always has `batch` of them in flight. Then `context` is what
            they have on average, prompt + output / 2, and between two tokens of one the prompts of others are computed.
        step: tokens of one prefill pass. imbalance: load of the busiest expert-parallel rank over the mean.

    Returns `tpot_ms` (between two tokens of a sequence), `ttft_ms` (for one prompt alone, of `prompt` tokens or else `context`),
    `tokens_per_s` (all sequences), `memory_gb_per_gpu` and its parts on the fullest GPU, `comm_bytes_per_token` (sent by one
    rank), and `terms` and `ttft_terms`, which add up to the times: name, ms, source; `sources` of the hardware's and engine's
    figures that they name.
    Raises ModelError, LayoutError or ValueError.
    """
    per_token = 0.0
    if output is not None:
        prompt = prompt or context
        context, per_token = round(prompt + output / 2), prompt / output
    load = Load(
        batch=batch, context=context, dtype=dtype, kv_dtype=kv_dtype,
        prompt=prompt or context, step=step, prompt_tokens_per_token=per_token, imbalance=imbalance,
    )  # fmt: skip
    at = deployment(model, hardware_, tp=tp, pp=pp, dp=dp, ep=ep, engine_=engine_, load=load)
    decode, prefill, memory = at.decode(), at.prefill(), at.memory()
    return {
        "model": model,
        "hardware": at.hw.name,
        "engine": at.engine.name,
        "layout": at.layout.as_dict(),
        "dtype": at.load.dtype,
        "kv_dtype": at.load.kv_dtype,
        "batch": batch,
        "context": context,
        "prompt": at.load.prompt,
        "tpot_ms": decode.seconds * 1e3,
        "ttft_ms": prefill.seconds * 1e3,
        "tokens_per_s": batch / decode.seconds,
        "memory_gb_per_gpu": memory["total_gb"],
        "memory": memory,
        "comm_bytes_per_token": at.wire_bytes_per_token(),
        "terms": _rows(decode),
        "ttft_terms": _rows(prefill),
        "sources": {f"hardware {at.hw.name}": at.hw.source, f"engine {at.engine.name}": at.engine.source},
    }


def _rows(terms: Terms) -> list[dict[str, Any]]:
    return [{"name": t.name, "ms": t.seconds * 1e3, "source": t.source} for t in terms.values() if t.seconds]
