"""What a model's shape means for one rank: bytes that it holds and reads, and arithmetic. Integer arithmetic, no torch tensors.

Any decoder-only shape: those that the engine runs, by `ModelConfig`; and others as far as bytes and arithmetic go (multi-head
latent attention, shared experts, sliding windows), from the entries of their config.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from labkit import split
from labkit.model.config import FAMILIES, ModelConfig, MoEConfig
from labkit.model.errors import ModelError
from labkit.model.find import find
from labkit.model.shapes import SHAPES

# Bytes of a weight in a matrix. int4 has a scale and a zero point of 16 bits for each group of 128 weights, or of 32.
WEIGHT_BYTES = {
    "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 4 / 128, "int4-g32": 0.5 + 4 / 32,
}  # fmt: skip
WEIGHT_ONLY = ("int8", "int4", "int4-g32")  # multiplied in 16 bits; every matrix is quantised, the output head too

# Shapes that the engine doesn't run. Sources: the config.json of each model's page on the Hugging Face Hub.
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "max_position_embeddings": 163840,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "num_local_experts": 128,
        "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072, "attention_bias": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries and keys through low ranks; what is cached is one
    vector of `kv_rank` + `rope` numbers for all heads, which every tensor-parallel rank holds."""

    q_rank: int
    kv_rank: int
    rope: int
    nope: int
    value: int


@dataclass(frozen=True)
class Shape:
    """One decoder. Counts of numbers are per layer unless named otherwise; sizes are in elements."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    moe: MoEConfig | None = None
    shared_width: int = 0  # of experts that every token goes to
    latent: Latent | None = None
    windowed: tuple[int, int] = (0, 0)  # this many layers look back over that many tokens only
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def layer_params(self) -> int:
        """Matrix parameters of one layer, as `ModelConfig` has them: `stage_layers` balances stages by them."""
        mlp = self.moe.experts * self.moe.width + self.shared_width if self.moe else self.intermediate
        return self.attention(1, 0) + 3 * self.hidden * mlp

    def sparse(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.moe.dense

    # -- one rank of `tp`, the `rank`-th; numbers of one layer -------------------------------------------------------------

    def attention(self, tp: int, rank: int) -> int:
        """Matrix parameters of attention."""
        share = split.heads(self.heads, self.kv_heads, tp)[rank]
        if self.latent is None:
            return self.hidden * self.head_dim * 2 * (len(share.query) + len(share.kv))
        low = self.latent
        down = self.hidden * (low.q_rank + low.kv_rank + low.rope)  # every rank has these
        up = low.q_rank * (low.nope + low.rope) + low.kv_rank * (low.nope + low.value)
        return down + len(share.query) * (up + low.value * self.hidden)

    def attention_vectors(self, tp: int, rank: int) -> int:
        """Biases and norms of attention, and the layer's own two norms."""
        share = split.heads(self.heads, self.kv_heads, tp)[rank]
        biases = (len(share.query) + 2 * len(share.kv)) * self.head_dim if self.qkv_bias else 0
        inner = 2 * self.head_dim if self.qk_norm else 0
        if self.latent:
            inner = self.latent.q_rank + self.latent.kv_rank
        return 2 * self.hidden + biases + inner + (self.hidden if self.out_bias else 0)

    def mlp(self, tp: int, rank: int, width: int) -> int:
        """Matrix parameters of an MLP of `width`, gate and up cut by rows, down by columns."""
        return 3 * self.hidden * len(split.even(width, tp)[rank]) if width else 0

    def mlp_vectors(self, tp: int, rank: int) -> int:
        return 2 * len(split.even(self.intermediate, tp)[rank]) + self.hidden if self.mlp_bias else 0

    def kv_numbers(self, tp: int, rank: int) -> int:
        """Numbers cached for a token."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope
        return 2 * len(split.heads(self.heads, self.kv_heads, tp)[rank].kv) * self.head_dim

    def kv_tokens(self, context: float) -> float:
        """Tokens whose K and V a layer reads for a sequence of `context` tokens, on average over the layers."""
        count, window = self.windowed
        return context - count / self.layers * max(0.0, context - window)

    def score_flops(self, tp: int, rank: int) -> int:
        """Operations for one pair of a query and a key, all heads of the rank, weighted values included."""
        query = len(split.heads(self.heads, self.kv_heads, tp)[rank].query)
        if self.latent:
            return 2 * query * (2 * self.latent.kv_rank + self.latent.rope)
        return 4 * query * self.head_dim


@cache
def stages(shape: Shape, pp: int) -> list[range]:
    """Layers of each stage, as the engine cuts them."""
    return split.layers(shape.layers, pp)


@cache
def shape_of(model: str) -> Shape:
    """The shape of a registered model, of a config.json, or of what `LLM` takes. Raises ModelError."""
    if model in OTHERS:
        return _other(OTHERS[model], model)
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if path.suffix == ".json" and path.exists():
        raw = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(raw, dict) and raw.get("model_type") not in FAMILIES:
            return _other(raw, model)
    return _of(config_of(model), model)


def config_of(model: str) -> ModelConfig:
    """The config of what `LLM` takes as a model, of a registered shape, or in a config.json."""
    unnamed = model in SHAPES or (Path(model).suffix == ".json" and not model.startswith("random:"))
    return find(f"random:{model}" if unnamed else model).config


def _of(cfg: ModelConfig, name: str) -> Shape:
    return Shape(
        name, cfg.layers, cfg.hidden, cfg.intermediate, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.vocab,
        cfg.max_positions, cfg.tied, cfg.moe, qkv_bias=cfg.qkv_bias, out_bias=cfg.out_bias, mlp_bias=cfg.mlp_bias,
        qk_norm=cfg.qk_norm,
    )  # fmt: skip


def _other(raw: Mapping[str, Any], name: str) -> Shape:
    """A shape of a family that the engine doesn't run: SwiGLU MLPs are assumed, what is not known is left out."""

    def get(*keys: str, default: int | None = None) -> int:
        value = next((raw[key] for key in keys if raw.get(key) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ModelError(f"{name}: {' or '.join(keys)}={value!r}; a whole number is needed")
        return value

    layers, hidden, heads = get("num_hidden_layers"), get("hidden_size"), get("num_attention_heads")
    moe, shared = None, 0
    if experts := get("n_routed_experts", "num_local_experts", "num_experts", default=0):
        width = get("moe_intermediate_size", "intermediate_size")
        dense = frozenset(range(get("first_k_dense_replace", default=0)))
        moe = MoEConfig(experts, get("num_experts_per_tok", "experts_per_token"), width, True, dense)
        shared = get("shared_expert_intermediate_size", default=get("n_shared_experts", default=0) * width)
    latent = None
    if raw.get("kv_lora_rank"):
        names = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        latent = Latent(*(get(key) for key in names))
    window = raw.get("sliding_window")
    windowed = (layers // 2, window) if raw.get("model_type") == "gpt_oss" and window else (0, 0)
    bias = bool(raw.get("attention_bias", False))
    return Shape(
        name, layers, hidden, get("intermediate_size"), heads, get("num_key_value_heads", default=heads),
        get("head_dim", default=hidden // heads), get("vocab_size"), get("max_position_embeddings", default=2**31),
        bool(raw.get("tie_word_embeddings", False)), moe, shared, latent, windowed, qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
