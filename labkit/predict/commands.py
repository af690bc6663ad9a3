"""Command lines that serve a layout with vLLM, SGLang and TensorRT-LLM.

Flags as documented there: vLLM, docs/serving/parallelism_scaling.md (096bd6a) and data_parallel_deployment.md (01e4fce); SGLang,
docs/advanced_features/server_arguments.md (004813e); TensorRT-LLM, tensorrt_llm/commands/serve.py (00209af). They change.
"""

import math

from labkit.predict.cost import USABLE, Deployment

# The Hub's names of registered shapes, for the command lines.
HUB = {
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf", "llama-2-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-chat-hf", "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-405b": "meta-llama/Llama-3.1-405B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3", "mistral-large-2": "mistralai/Mistral-Large-Instruct-2407",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct", "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-32b": "Qwen/Qwen3-32B", "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B", "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3", "gpt-oss-120b": "openai/gpt-oss-120b",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}  # fmt: skip


def commands(at: Deployment, model: str) -> dict[str, str]:
    """By program, what to start on the first node, and on the others (node `i` of them); HEAD is the first one's address."""
    return {"vllm": _vllm(at, model), "sglang": _sglang(at, model), "tensorrt-llm": _tensorrt_llm(at, model)}


def _longest(at: Deployment) -> int:
    """Tokens of a sequence at its end: under load, `context` is what one has on average."""
    load = at.load
    output = load.prompt / load.prompt_tokens_per_token if load.prompt_tokens_per_token else 0.0
    return math.ceil(load.context + output / 2)


def _several(count: int) -> str:
    return f"\n# {count} such servers, behind a router" if count > 1 else ""


def _vllm(at: Deployment, model: str) -> str:
    layout, load, node = at.layout, at.load, at.hw.node_gpus
    replica = layout.tp * layout.pp
    line = f"vllm serve {model} --tensor-parallel-size {layout.tp}"
    if layout.pp > 1:
        line += f" --pipeline-parallel-size {layout.pp}"
    if layout.ep > 1:
        line += " --enable-expert-parallel"
    line += f" --max-model-len {_longest(at)} --max-num-seqs {at.sequences} --gpu-memory-utilization {USABLE}"
    if load.dtype == "fp8":
        line += " --quantization fp8"
    if load.kv_dtype == "fp8":
        line += " --kv-cache-dtype fp8"
    if replica > node:  # each replica on several nodes
        line += f" --nnodes {-(-replica // node)} --master-addr HEAD --node-rank"
        return f"{line} 0\n# on node i > 0: {line} i --headless{_several(layout.dp)}"
    if layout.dp > 1:
        line += f" --data-parallel-size {layout.dp}"
    if layout.world > node:  # several replicas on each node
        here = node // replica
        line += f" --data-parallel-size-local {here} --data-parallel-address HEAD --data-parallel-rpc-port 13345"
        return f"{line}\n# on node i > 0: {line} --headless --data-parallel-start-rank {here}*i"
    return line


def _sglang(at: Deployment, model: str) -> str:
    layout, load, node = at.layout, at.load, at.hw.node_gpus
    together = (
        layout.ep > 1
    )  # replicas that share experts are one group there: its size is tp, of which dp attend apart
    tp, servers = (layout.tp * layout.dp, 1) if together else (layout.tp, layout.dp)
    line = f"python -m sglang.launch_server --model-path {model} --tp-size {tp}"
    if layout.pp > 1:
        line += f" --pp-size {layout.pp}"
    if together:
        line += f" --ep-size {layout.ep}"
        if layout.dp > 1:
            line += f" --dp-size {layout.dp} --enable-dp-attention"
    running = load.batch if together else at.sequences
    line += f" --context-length {_longest(at)} --max-running-requests {running} --mem-fraction-static {USABLE}"
    if load.dtype == "fp8":
        line += " --quantization fp8"
    if load.kv_dtype == "fp8":
        line += " --kv-cache-dtype fp8_e4m3"
    if tp * layout.pp > node:
        line += f" --nnodes {-(-tp * layout.pp // node)} --dist-init-addr HEAD:20000 --node-rank"
        line = f"{line} 0\n# on node i > 0: {line} i"
    return line + _several(servers)


def _tensorrt_llm(at: Deployment, model: str) -> str:
    layout, node = at.layout, at.hw.node_gpus
    together = layout.ep > 1
    tp, servers = (layout.tp * layout.dp, 1) if together else (layout.tp, layout.dp)
    line = f"trtllm-serve {model} --tp_size {tp}"
    if layout.pp > 1:
        line += f" --pp_size {layout.pp}"
    if together:
        line += f" --ep_size {layout.ep}"
    line += f" --max_batch_size {at.sequences} --max_seq_len {_longest(at)} --max_num_tokens {at.load.step}"
    line += f" --kv_cache_free_gpu_memory_fraction {USABLE}"
    apart = together and layout.dp > 1
    if apart:
        line += " --config apart.yaml"
    if tp * layout.pp > node:
        line = f"srun --mpi=pmix -N {-(-tp * layout.pp // node)} --ntasks-per-node {node} trtllm-llmapi-launch {line}"
    note = (
        "\n# apart.yaml: enable_attention_dp: true (every GPU then attends for sequences of its own)" if apart else ""
    )
    return line + note + _several(servers)
