"""Tiny random checkpoints of every family, written by transformers, and transformers' own answers for them."""

from pathlib import Path

import torch
import transformers

_SIZES = {
    "vocab_size": 101,  # odd, so that vocabulary shares are uneven
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 4096}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 10, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 21, "norm_topk_prob": False,
            "mlp_only_layers": [1], "head_dim": 10,
        },
    ),
    "qwen3_moe_normalised": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
            "decoder_sparse_step": 2, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
MOE = ("mixtral", "qwen3_moe", "qwen3_moe_normalised")


def write(family: str, folder: Path, *, shards: bool = False) -> torch.nn.Module:
    """Saves a tiny float32 model of `family` in `folder` and returns it. Biases and norms are random too."""
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**{**_SIZES, **options})
    if family in MOE:
        config._experts_implementation = "eager"  # its grouped products refuse widths like these
    torch.manual_seed(sum(map(ord, family)))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder, max_shard_size="60KB" if shards else "1GB")
    return model


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """transformers' logits (len(ids), vocab) of one sequence."""
    return model(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """transformers' greedy continuation, end tokens ignored."""
    ids, past, out = torch.tensor([prompt]), None, []
    for _ in range(tokens):
        step = model(ids, past_key_values=past, use_cache=True)
        past, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out
