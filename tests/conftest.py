"""What several test files share: the real model's prompts, and transformers' answers to them."""

import os

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from labkit.model.find import find

os.environ["LABKIT_PROGRESS"] = "off"  # tests don't learn


def pytest_configure(config: pytest.Config) -> None:
    """Ranks are CPU cores on a machine with GPUs too, unless the tests for these are asked for: `pytest -m gpu`."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three uses of copper.",
]


@pytest.fixture(scope="session")
def questions_and_answers() -> tuple[list[list[int]], list[list[int]]]:
    """Prompt ids, and the 64 tokens that transformers generates for each in float32."""
    folder = find("smollm2-135m").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
    return prompts, [tiny.greedy(model, p, 64) for p in prompts]
