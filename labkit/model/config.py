"""What a decoder-only model looks like, read from a Hugging Face config.json.

`ModelConfig` holds numbers only; it knows nothing of files of weights, of ranks or of tensors. An architecture or option
that the decoder doesn't implement is refused by name here, before anything starts.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.model.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3")
LARGEST, MOST_LAYERS = 2**31, 1000  # no model has more; a damaged config.json may well say so


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers: `experts` MLPs of `width` inner features, of which the router picks `per_token` for a token.

    normalise: whether the weights of those picked are scaled to add up to 1. dense: layers that have one plain MLP instead.
    """

    experts: int
    per_token: int
    width: int
    normalise: bool
    dense: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ModelConfig:
    """The shape and options of one decoder. Sizes count elements; `rope` holds rope_type, rope_theta and what the type needs."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rms_eps: float
    rope: Mapping[str, Any]
    tied: bool  # output head shares the embedding's matrix
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    sliding_window: int | None = None
    moe: MoEConfig | None = None

    @property
    def layer_params(self) -> int:
        """Matrix parameters of one layer, all its experts included (biases and norms, below 0.1 %, left out)."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        width = self.moe.experts * self.moe.width if self.moe else self.intermediate
        return attention + 3 * self.hidden * width

    def sparse(self, layer: int) -> bool:
        """Whether `layer` has experts."""
        return self.moe is not None and layer not in self.moe.dense

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers in 16-bit numbers, each KV head held once."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    @classmethod
    def read(cls, path: Path) -> "ModelConfig":
        """From a config.json, or the folder that holds one."""
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{file} does not exist: a model folder needs a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(f"{file} is not JSON: {error}") from None
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from None
        if not isinstance(raw, dict):
            raise ModelError(f"{file} holds a {type(raw).__name__}, not a JSON object")
        return cls.from_dict(raw, where=str(file))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config") -> "ModelConfig":
        """From the mapping that a config.json holds. Raises ModelError naming what is missing, wrong or not supported."""

        def size(key: str, default: int | None = None, most: int = LARGEST) -> int:
            value: Any = raw.get(key)
            value = default if value is None else value
            if not _whole(value, 1):
                raise ModelError(f"{where}: {key}={value!r}; a whole number, 1 or more, is needed")
            if value > most:
                raise ModelError(f"{where}: {key}={value!r} can't be meant: {most} is the most that is believed")
            return int(value)

        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ModelError(f"{where}: model_type={family!r} is not supported; supported are {', '.join(FAMILIES)}")
        act = raw.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise ModelError(f"{where}: hidden_act={act!r} is not supported; supported is 'silu'")
        if raw.get("quantization_config"):
            raise ModelError(f"{where}: quantization_config is not supported; use an unquantised checkpoint")
        heads = size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        hidden = size("hidden_size")
        if heads % kv_heads:
            raise ModelError(
                f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        if raw.get("head_dim") is None and hidden % heads:
            raise ModelError(f"{where}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        head_dim = size("head_dim", hidden // heads)
        if head_dim % 2:
            raise ModelError(
                f"{where}: head_dim={head_dim}; an even number is needed, positions turn pairs of features"
            )
        eps = raw.get("rms_norm_eps", 1e-6)
        if not _positive(eps):
            raise ModelError(f"{where}: rms_norm_eps={eps!r}; a number above 0 is needed")
        attention_bias = bool(raw.get("attention_bias", False))
        return cls(
            family=family,
            layers=size("num_hidden_layers", most=MOST_LAYERS),
            hidden=hidden,
            intermediate=size("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=size("vocab_size"),
            max_positions=size("max_position_embeddings", 2048),
            rms_eps=float(eps),
            rope=_rope(raw, where),
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            out_bias=family in ("llama", "qwen3", "qwen3_moe") and attention_bias,
            mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
            qk_norm=family in ("qwen3", "qwen3_moe"),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
            bos_ids=_ids(raw, "bos_token_id", where),
            eos_ids=_ids(raw, "eos_token_id", where),
            sliding_window=_sliding_window(raw, where),
            moe=_moe(raw, size),
        )


def _moe(raw: Mapping[str, Any], size: Callable[..., int]) -> MoEConfig | None:
    """Defaults are those of transformers' MixtralConfig and Qwen3MoeConfig."""
    if raw["model_type"] == "mixtral":
        moe = MoEConfig(size("num_local_experts", 8), size("num_experts_per_tok", 2), size("intermediate_size"), True)
    elif raw["model_type"] == "qwen3_moe":
        every, layers = size("decoder_sparse_step", 1), range(size("num_hidden_layers", most=MOST_LAYERS))
        named = raw.get("mlp_only_layers") or []
        if not isinstance(named, list) or not all(_whole(i, 0) for i in named):
            raise ModelError(f"mlp_only_layers={named!r}; a list of layers is needed")
        dense = set(named) | {i for i in layers if (i + 1) % every}
        moe = MoEConfig(
            size("num_experts", raw.get("num_local_experts", 128)), size("num_experts_per_tok", 8),
            size("moe_intermediate_size", 768), bool(raw.get("norm_topk_prob", False)), frozenset(dense),
        )  # fmt: skip
    else:
        return None
    if moe.per_token > moe.experts:
        raise ModelError(f"num_experts_per_tok={moe.per_token} is more than the {moe.experts} experts there are")
    return moe


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _ids(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = raw.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(_whole(i, 0) for i in ids):
        raise ModelError(f"{where}: {key}={value!r}; a token id, or a list of them, is needed")
    return ids


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary embedding options from either spelling: rope_theta + rope_scaling, or the newer rope_parameters."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ModelError(f"{where}: rope parameters {found!r} are not an object of names and numbers")
    rope = dict(found)
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope["rope_type"] not in ROPE_TYPES:
        raise ModelError(
            f"{where}: rope type {rope['rope_type']!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[rope["rope_type"]]
    if missing := [key for key in needed if key not in rope]:
        raise ModelError(f"{where}: rope type {rope['rope_type']!r} needs {', '.join(missing)}")
    for key in ("rope_theta", *needed):
        if not _positive(rope[key]):
            raise ModelError(f"{where}: {key}={rope[key]!r}; a number above 0 is needed")
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor is not supported")
    return rope


def _sliding_window(raw: Mapping[str, Any], where: str) -> int | None:
    """Tokens that attention may look back over, or None. Contexts up to it are served; longer ones are refused later."""
    if raw.get("model_type") in ("qwen2", "qwen3", "qwen3_moe") and not raw.get("use_sliding_window", False):
        return None
    window = raw.get("sliding_window")
    if window is not None and not _whole(window, 1):
        raise ModelError(f"{where}: sliding_window={window!r}; null, or a whole number, 1 or more, is needed")
    if raw.get("model_type") == "llama" and window:
        raise ModelError(f"{where}: sliding_window={window!r} is not supported for llama")
    return window
