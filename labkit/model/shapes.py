"""Published shapes that `random:NAME` (seeded random weights) and dry runs know by name, as Hugging Face config entries.

Sources: the config.json of each model's page on the Hugging Face Hub; Llama 3.1: arXiv 2407.21783, table 3; GPT-3: arXiv
2005.14165, table 2.1.
"""

from typing import Any

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(
    family: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    sizes = {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    return {**sizes, **more}


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape(
        "llama", 30, 576, 1536, 9, 3, 49152,
        max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
    ),
    "tinyllama-1.1b": _shape("llama", 22, 2048, 5632, 32, 4, 32000, max_position_embeddings=2048),
    "llama-2-7b": _shape("llama", 32, 4096, 11008, 32, 32, 32000, max_position_embeddings=4096),
    "llama-2-70b": _shape("llama", 80, 8192, 28672, 64, 8, 32000, max_position_embeddings=4096),
    "llama-3.1-8b": _shape(
        "llama", 32, 4096, 14336, 32, 8, 128256,
        max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=_LLAMA3,
    ),
    "llama-3.1-70b": _shape(
        "llama", 80, 8192, 28672, 64, 8, 128256,
        max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=_LLAMA3,
    ),
    # GPT-3's MLP is two matrices of 4 x hidden; three of two thirds that width are as many parameters and as much arithmetic.
    # (Its learned positions and biases, 0.02 %, are left out.)
    "gpt-3-175b": _shape(
        "llama", 96, 12288, 32768, 96, 96, 50257, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "llama-2-13b": _shape("llama", 40, 5120, 13824, 40, 40, 32000, max_position_embeddings=4096),
    "llama-3.2-1b": _shape(
        "llama", 16, 2048, 8192, 32, 8, 128256,
        max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=_LLAMA3 | {"factor": 32.0},
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _shape(
        "llama", 28, 3072, 8192, 24, 8, 128256,
        max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=_LLAMA3 | {"factor": 32.0},
        tie_word_embeddings=True,
    ),
    "mistral-7b": _shape("mistral", 32, 4096, 14336, 32, 8, 32768, max_position_embeddings=32768, rope_theta=1e6),
    "mistral-large-2": _shape(
        "mistral", 88, 12288, 28672, 96, 8, 32768, max_position_embeddings=131072, rope_theta=1e6, head_dim=128
    ),
    "qwen2.5-7b": _shape("qwen2", 28, 3584, 18944, 28, 4, 152064, max_position_embeddings=32768, rope_theta=1e6),
    "qwen2.5-72b": _shape("qwen2", 80, 8192, 29568, 64, 8, 152064, max_position_embeddings=32768, rope_theta=1e6),
    "qwen3-8b": _shape(
        "qwen3", 36, 4096, 12288, 32, 8, 151936, max_position_embeddings=40960, rope_theta=1e6, head_dim=128
    ),
    "qwen3-32b": _shape(
        "qwen3", 64, 5120, 25600, 64, 8, 151936, max_position_embeddings=40960, rope_theta=1e6, head_dim=128
    ),
    "mixtral-8x7b": _shape(
        "mixtral", 32, 4096, 14336, 32, 8, 32000,
        max_position_embeddings=32768, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2,
    ),
    "mixtral-8x22b": _shape(
        "mixtral", 56, 6144, 16384, 48, 8, 32000,
        max_position_embeddings=65536, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen3-30b-a3b": _shape(
        "qwen3_moe", 48, 2048, 6144, 32, 4, 151936, max_position_embeddings=40960, rope_theta=1e6, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "qwen3-235b-a22b": _shape(
        "qwen3_moe", 94, 4096, 12288, 64, 4, 151936, max_position_embeddings=40960, rope_theta=1e6, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, norm_topk_prob=True,
    ),
    "llama-3.1-405b": _shape(
        "llama", 126, 16384, 53248, 128, 8, 128256,
        max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=_LLAMA3,
    ),
}  # fmt: skip
