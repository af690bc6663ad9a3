"""This machine's own constants for the cost model: measured through the engine in a minute or two, kept with their date.

On CPUs the time of a product depends on how many tokens it is for, on the length of its rows and on what other cores do. So all
is measured where it is used: small models of several shapes are served in the very setting that is asked about (so many
tensor-parallel ranks, so many busy stages or replicas, so many threads), and least squares take their times apart into what a
step, a layer, a byte of weights, a row of a matrix, a byte of the KV cache and a score cost. Exchanges are timed on their own
(`labkit.measure.collectives`).

Other guests of the same host can halve what memory gives, and from one minute to the next. So what waits for memory is kept in
reads of so many bytes, whose rate is measured beside the probes, and again, in a moment, for each prediction.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache, cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from labkit import split
from labkit.engine.llm import LLM, chosen_dtype
from labkit.engine.requests import SamplingParams
from labkit.launch.local import threads_per_rank
from labkit.measure.collectives import sweep
from labkit.measure.machine import hardware as machine
from labkit.measure.machine import usable_cores
from labkit.measure.roofline import memory_bandwidth
from labkit.mesh import Layout
from labkit.model.gguf_import import cache_root
from labkit.predict.cost import KV_BYTES, Deployment, Engine, Load, Terms
from labkit.predict.hardware import Curve, Hardware
from labkit.predict.shape import WEIGHT_BYTES, shape_of, stages

# Amounts of what has a price; the seconds of all together; the seconds of the step that they are a part of.
Point = tuple[Mapping[str, float], float, float]

BATCHES = (1, 2, 4, 8, 32)  # sequences of each replica
FEW = 8  # of them, where contexts are long
SHORT, LONG = 16, 768  # tokens of prompts before a decode: where contexts hardly count, and where they do
PROMPTS = (256, 768)  # tokens of a prefill
TOKENS, REPEATS = 24, 3
EXCHANGED = tuple(2**k for k in range(6, 23, 2))  # bytes


def _probe(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 4096, "dtype": "bfloat16",
        "max_position_embeddings": 4096,
    }  # fmt: skip


# Two of hardly any weights, with few and many layers; and three of short and long rows, each with more weights than caches hold.
SMALL = (_probe(2, 64, 128, 2, 2), _probe(18, 64, 128, 2, 2))
LARGE = (_probe(32, 576, 1536, 9, 3), _probe(12, 1024, 2816, 16, 4), _probe(4, 2048, 5632, 32, 4))


@dataclass(frozen=True)
class Setting:
    """How ranks share the machine: tensor-parallel ranks of a stage, stages or replicas busy at once, threads of each rank."""

    tp: int
    busy: int
    threads: int

    def __str__(self) -> str:
        return f"tp={self.tp}, {self.busy} busy, {self.threads} thread(s)"

    def bandwidth(self) -> float:
        """Bytes/s that memory now gives to so many threads."""
        return 1e9 * memory_bandwidth(self.tp * self.busy * self.threads)


@dataclass(frozen=True)
class Constants:
    """Seconds: of a step, of a layer, of a sequence in each layer; of a byte of weights beyond its reading, for each of `BATCHES`
    tokens at once and each of `lengths`, the numbers in a row of a matrix. In prefill: of a byte of weights for each token, and
    of an operation of attention.

    In bytes that memory reads meanwhile: of a byte of weights (`reads`, for each length), of a byte of K and V, and of an
    operation of attention."""

    measured: str
    dtype: str
    step: float
    layer: float
    sequence: float
    lengths: Sequence[float]
    reads: Sequence[float]  # (lengths,)
    byte: Sequence[Sequence[float]]  # (batches, lengths)
    kv_byte: float
    score: float
    prefill_byte: float
    prefill_score: float

    def of_a_byte(self, tokens: float, length: float, bandwidth: float) -> float:
        """Seconds of a byte of weights, where memory gives `bandwidth` bytes/s. Between what was measured, straight lines (over
        the logarithm of the length); for more tokens in proportion to them."""
        read, *at = (float(np.interp(np.log(length), np.log(self.lengths), row)) for row in (self.reads, *self.byte))
        at = [read / bandwidth + more for more in at]
        return at[-1] * tokens / BATCHES[-1] if tokens > BATCHES[-1] else float(np.interp(tokens, BATCHES, at))


@dataclass(frozen=True)
class Work:
    """What one pass of a rank is made of: see `Constants`."""

    layers: int
    sequences: float
    tokens: float
    read: float
    rows: int
    kv: float
    scores: float


class LocalDeployment(Deployment):
    """A model on this machine's cores, served by the engine here."""

    @cached_property
    def bandwidth(self) -> float:
        return self.setting.bandwidth()

    @property
    def setting(self) -> Setting:
        return Setting(self.layout.tp, self.layout.dp * self.lanes, threads_per_rank(self.layout.world))

    def work(self, stage: int, tokens: float, sequences: float, kv_tokens: float, pairs: float) -> Work:
        shape, tp = self.shape, self.layout.tp
        layers = len(stages(shape, self.layout.pp)[stage])
        read, _, _ = self._work(stage, tokens)
        # A matrix has a row for each number that comes out: q, k and v; gate and up; the two that give back the residual.
        heads = shape.attention(tp, 0) // (2 * shape.hidden) + shape.kv_numbers(tp, 0) // 2
        inner = 2 * shape.mlp(tp, 0, shape.intermediate) // (3 * shape.hidden)
        rows = layers * (heads + inner + 2 * shape.hidden)
        # Threads share out KV heads of all sequences: some wait for those that have one more.
        threads, shared = self.setting.threads, sequences * len(split.heads(shape.heads, shape.kv_heads, tp)[0].kv)
        uneven = -(-shared // threads) * threads / shared if tokens == sequences else 1.0
        kv = uneven * layers * shape.kv_numbers(tp, 0) * KV_BYTES[self.load.kv_dtype] * kv_tokens
        return Work(layers, sequences, tokens, read, rows, kv, uneven * layers * shape.score_flops(tp, 0) * pairs)

    def length(self, work: Work) -> float:
        """Numbers in a row of a matrix, on average, of a stage's layers and its part of the head."""
        rows = work.rows + len(self._vocabulary(0)[-1])
        return (work.read + self.head_read) / WEIGHT_BYTES[self.load.dtype] / rows

    def head(self, sequences: float) -> Terms:
        known, terms = constants(self.setting, self.load.dtype), Terms()
        length = self.length(self.work(0, 1, 1, 0.0, 0.0))
        seconds = self.head_read * known.of_a_byte(sequences, length, self.bandwidth)
        source = f"{self.head_read / 1e6:.4g} MB; measured here, {self.setting}, {known.measured}"
        terms.put("output head", seconds, source)
        for name, seconds in self.met(sequences).items():
            terms.put(name, seconds, "timed here")
        return terms

    def stage(self, stage: int, tokens: float, sequences: float, kv_tokens: float, pairs: float) -> Terms:
        work, known = self.work(stage, tokens, sequences, kv_tokens, pairs), constants(self.setting, self.load.dtype)
        terms, source = Terms(), f"measured here, {self.setting}, {known.measured}"
        if tokens == sequences:
            products = work.read * known.of_a_byte(tokens, self.length(work), self.bandwidth)
            attention = (work.kv * known.kv_byte + work.scores * known.score) / self.bandwidth
            pace = f"; memory now reads {self.bandwidth / 1e9:.3g} GB/s"
        else:
            products = work.read * tokens * known.prefill_byte
            attention = work.scores * known.prefill_score
            pace = ""
        at_once = f"{work.read / 1e6:.4g} MB for {tokens} token(s) at once"
        terms.put("weights and products", products, f"{at_once}; {source}{pace}")
        terms.put("attention", attention, f"{work.kv / 1e6:.3g} MB of KV cache; {source}{pace}")
        terms.put("layers", work.layers * known.layer, f"{known.layer * 1e6:.0f} us each; {source}")
        each = f"{known.sequence * 1e6:.0f} us each and layer; {source}"
        terms.put("sequences", work.layers * sequences * known.sequence, each)
        terms.put("step", known.step, f"schedule, sampling, embedding; {source}")
        terms.put("all-reduce", self.exchanged(stage, tokens), "timed here")
        return terms

    def exchanged(self, stage: int, tokens: float) -> float:
        """Seconds of a pass in exchanges between the ranks of a stage."""
        tp, layers = self.layout.tp, len(stages(self.shape, self.layout.pp)[stage])
        reduce = exchange("all_reduce", tp, tokens * self.shape.hidden * self._residual) if tp > 1 else 0.0
        return (2 * layers + (stage == 0)) * reduce

    def met(self, sequences: float) -> dict[str, float]:
        """Seconds in exchanges for the choice of the next token of `sequences`."""
        tp, pp = self.layout.tp, self.layout.pp
        found = {"logits": exchange("all_gather", tp, 16 * sequences * tp) if tp > 1 else 0.0}
        if pp > 1:
            hidden = exchange("broadcast", pp, sequences * self.shape.hidden * self._residual)
            pairs = exchange("all_gather", pp, 16 * sequences * pp)
            found["choice to all stages"] = hidden + pairs
        return found

    def _hops(self, tokens: int) -> Terms:
        terms, pp = Terms(), self.layout.pp
        if pp > 1:
            payload = tokens * self.shape.hidden * self._residual
            hops = (pp - 1) * exchange("send_recv", 2, payload)
            terms.put("pipeline hops", hops, f"{pp - 1} of {payload:,} bytes; timed here")
        return terms


def deployment(model: str, layout: Layout, load: Load) -> LocalDeployment:
    """Raises ValueError for more ranks than cores, and for experts, which are not measured."""
    shape, cores = shape_of(model), usable_cores()
    dtype = chosen_dtype(load.dtype, "bfloat16")
    load = replace(load, dtype=dtype, kv_dtype=dtype)
    if layout.world > cores:
        raise ValueError(
            f"hardware local: {layout.world} ranks on {cores} core(s); times of more ranks than cores say little"
        )
    if shape.moe or load.prompt_tokens_per_token:
        raise ValueError("hardware local: only for dense models, and without the load of a server (--output)")
    hw = Hardware("local", psutil.virtual_memory().total / 1e9 / layout.world, 1.0, 1.0, source=machine("cpu"))
    engine = Engine("labkit", 1.0, 1.0, 0.0, 0.0, 0.0, {}, "all", False, "measured on this machine")
    return LocalDeployment(shape, hw, engine, layout, load)


# -- what was measured ------------------------------------------------------------------------------------------------------


def constants(setting: Setting, dtype: str) -> Constants:
    """Those that are kept, or measured now."""
    kept, key = _kept(), f"{setting}, {dtype}"
    if key not in kept:
        kept[key] = asdict(measure(setting, dtype))
        _keep(kept)
    return Constants(**kept[key])


def exchange(op: str, ranks: int, size: float) -> float:
    """Seconds of an exchange between ranks of this machine; a send takes the sockets, the others what memory the ranks share."""
    kept, key = _kept(), f"{op}, {ranks} ranks"
    if key not in kept:
        frame = sweep([ranks], [op], EXCHANGED, seconds=0.05)
        frame = frame[frame["path"] == frame["path"].iloc[0]]
        kept[key] = [frame["bytes"].tolist(), (frame["median_us"] / 1e6).tolist()]
        _keep(kept)
    sizes, seconds = kept[key]
    return Curve.of(sizes, seconds, "").at(size)


def forget() -> None:
    """Forgets what was measured, after a change of the machine or of the engine."""
    _file().unlink(missing_ok=True)


def _file() -> Path:
    return cache_root() / "local.json"


@cache
def _engine() -> str:
    """A checksum of what serves: of the engine, the model, how they are split, and what is compiled."""
    parts = [
        path
        for name in ("engine", "model", "parallel", "native")
        for path in Path(split.__file__).parent.glob(f"{name}/*.*")
    ]
    code = b"".join(path.read_bytes() for path in sorted(parts) if path.suffix in (".py", ".so"))
    return f"{zlib.crc32(code):08x}"


def _machine() -> str:
    """What the constants are of, and which: what another machine or version has kept is measured again."""
    names = " ".join((*Constants.__dataclass_fields__, *map(str, BATCHES)))
    kernels = os.environ.get("LABKIT_KERNELS", "C")
    return f"{machine('cpu')}, torch {torch.__version__}, kernels {kernels}, engine {_engine()}: {names}"


def _kept() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found["measured"] if found.get("machine") == _machine() else {}


def _keep(measured: dict[str, Any]) -> None:
    _file().parent.mkdir(parents=True, exist_ok=True)
    _file().write_text(json.dumps({"machine": _machine(), "measured": measured}, indent=1), encoding="utf-8")


# -- measuring ------------------------------------------------------------------------------------------------------------


def measure(setting: Setting, dtype: str) -> Constants:
    """Serves the probes in a setting, and takes their times apart: what small models and long contexts cost gives the constants
    of steps, layers and attention; the rest of the large ones' times is their weights'."""
    layout = Layout(tp=setting.tp, dp=setting.busy)
    small: list[Point] = []
    attention: list[Point] = []
    prefill: list[Point] = []
    weights: list[tuple[LocalDeployment, dict[int, float], float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, config in enumerate(SMALL + LARGE):
            file = Path(folder) / f"probe{number}.json"
            file.write_text(json.dumps(config))
            at = deployment(str(file), layout, Load(dtype=dtype))
            before = setting.bandwidth()
            short, long, prompts = _serve(str(file), setting, dtype, large=config in LARGE)
            bandwidth = (before + setting.bandwidth()) / 2
            alone = {n: seconds - at.exchanged(0, n) - sum(at.met(n).values()) for n, seconds in short.items()}
            if config in SMALL:
                layers = at.shape.layers
                small += [({"step": 1, "layer": layers, "sequence": layers * n}, alone[n], alone[n]) for n in BATCHES]
                continue
            weights.append((at, alone, bandwidth))
            for n, seconds in long.items():
                more = n * (LONG - SHORT)
                work = at.work(0, n, n, more, more)
                amounts = {"kv_byte": work.kv / bandwidth, "score": work.scores / bandwidth}
                attention.append((amounts, seconds - short[n], seconds))
            for prompt, seconds in prompts.items():
                work = at.work(0, prompt, 1, 0.0, prompt**2 / 2)
                rest = seconds - at.exchanged(0, prompt) - sum(at.met(1).values())
                prefill.append(({"prefill_byte": work.read * prompt, "prefill_score": work.scores}, rest, seconds))
    found = solve(small) | solve(attention) | solve(prefill)
    byte: list[list[float]] = []
    for n in BATCHES:
        byte.append([])
        for at, alone, bandwidth in weights:
            work = at.work(0, n, n, n * (SHORT + TOKENS / 2), n * (SHORT + TOKENS / 2))
            other = found["step"] + work.layers * (found["layer"] + n * found["sequence"])
            other += (work.kv * found["kv_byte"] + work.scores * found["score"]) / bandwidth
            byte[-1].append(max(0.0, alone[n] - other) / (work.read + at.head_read))
    reads = [one * bandwidth for one, (_, _, bandwidth) in zip(byte[0], weights, strict=True)]
    byte = [[max(0.0, seconds - one) for seconds, one in zip(row, byte[0], strict=True)] for row in byte]
    lengths = [at.length(at.work(0, 1, 1, 0.0, 0.0)) for at, _, _ in weights]
    return Constants(measured=f"{date.today():%Y-%m-%d}", dtype=dtype, lengths=lengths, reads=reads, byte=byte, **found)


def _serve(model: str, setting: Setting, dtype: str, *, large: bool) -> tuple[dict[int, float], ...]:
    """Times of a probe, in seconds: per token, by the sequences of each replica, after short prompts; the same after long ones;
    of a prefill, by the prompt's tokens."""
    most = BATCHES[-1] * setting.busy
    with LLM(
        f"random:{model}", tensor_parallel_size=setting.tp, data_parallel_size=setting.busy, threads=setting.threads,
        dtype=dtype, max_model_len=max(LONG, *PROMPTS) + TOKENS, max_num_seqs=BATCHES[-1],
        max_num_batched_tokens=FEW * LONG,
    ) as llm:  # fmt: skip

        def run(sequences: int, prompt: int, tokens: int, figure: str, repeats: int) -> float:
            ids = torch.randint(0, 4096, (sequences, prompt), generator=torch.Generator().manual_seed(0)).tolist()
            times = []
            for _ in range(repeats):
                llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
                times.append(llm.report()[figure] / 1e3)
            return median(times)

        run(most, SHORT, TOKENS, "itl_ms", 1)  # to warm up
        short = {n: run(n * setting.busy, SHORT, TOKENS, "itl_ms", REPEATS) for n in BATCHES}
        if not large:
            return short, {}, {}
        # Most of the time of long contexts is their prefill: once is enough.
        long = {n: run(n * setting.busy, LONG, TOKENS, "itl_ms", 1) for n in (1, FEW)}
        return short, long, {prompt: run(setting.busy, prompt, 1, "ttft_ms", REPEATS) for prompt in PROMPTS}


def compared(
    model: str, layouts: Sequence[Layout] = (), batches: Sequence[int] = (1, 4, 8), contexts: Sequence[int] = (128, 1024),
    dtype: str = "auto",
) -> list[dict[str, Any]]:  # fmt: skip
    """Decode of a model here, measured and predicted, in milliseconds between two tokens of a sequence.

    layouts: by default one rank, and all cores along tp and along pp.
    """
    found, cores = [], usable_cores()
    for layout in layouts or [Layout(), *([Layout(tp=cores), Layout(pp=cores)] if cores > 1 else [])]:
        with LLM(
            model, tensor_parallel_size=layout.tp, pipeline_parallel_size=layout.pp, data_parallel_size=layout.dp,
            dtype=dtype, max_model_len=max(contexts) + TOKENS, max_num_seqs=max(batches),
        ) as llm:  # fmt: skip
            vocab = llm.model.config.vocab
            for batch, context in [(batch, context) for batch in batches for context in contexts]:
                size = (batch, context - TOKENS // 2)
                ids = torch.randint(0, vocab, size, generator=torch.Generator().manual_seed(0)).tolist()
                load = Load(batch=batch, context=context, dtype=dtype)

                def foretold(load: Load = load, layout: Layout = layout) -> tuple[float, float]:
                    at = deployment(model.removeprefix("random:"), layout, load)
                    return at.decode().seconds * 1e3, at.bandwidth / 1e9

                params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
                times, guesses = [], [foretold()]  # one before and one after each run: memory changes its pace
                for _ in range(REPEATS):
                    llm.generate(ids, params, use_tqdm=False)
                    times.append(llm.report()["itl_ms"])
                    guesses.append(foretold())
                measured, (predicted, rate) = median(times), map(median, zip(*guesses, strict=True))
                found.append(
                    {
                        "model": model, "layout": layout.as_dict(), "batch": batch, "context": context,
                        "memory_gb_per_s": rate, "measured_ms": measured, "predicted_ms": predicted,
                        "error": predicted / measured - 1,
                    }
                )  # fmt: skip
    return found


def solve(points: Sequence[Point]) -> dict[str, float]:
    """The constants, none below zero, of which each point's amounts should add up to its seconds: least squares of errors as
    parts of the point's step; what comes out below zero is left out and the rest solved again."""
    names = list(dict.fromkeys(name for amounts, _, _ in points for name in amounts))
    matrix = np.array([[amounts.get(name, 0.0) / step for name in names] for amounts, _, step in points])
    seconds = np.array([part / step for _, part, step in points])
    scale = np.abs(matrix).max(axis=0)
    kept = [i for i in range(len(names)) if scale[i] > 0]
    while True:
        found = np.linalg.lstsq(matrix[:, kept] / scale[kept], seconds, rcond=None)[0]
        if len(kept) == 1 or found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    constants = dict.fromkeys(names, 0.0)
    constants |= {names[i]: float(max(0.0, x) / scale[i]) for i, x in zip(kept, found, strict=True)}
    return constants
