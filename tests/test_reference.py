"""Our tensor parallelism against PyTorch's own parallelize_module, on the same checkpoint and the same ranks."""

from pathlib import Path

import pytest
import tiny
import torch
from test_decoder import PROMPTS, _logits

from labkit import Layout, run
from labkit.comm import Comm
from labkit.launch.local import RankError
from labkit.parallel.reference import parallelize


def both(comm: Comm, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits after each prompt: ours, and those of transformers cut by PyTorch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cut = parallelize(model, comm)
    assert cut.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] * comm.world_size == 48
    ours = _logits(comm, folder)[0]
    with torch.inference_mode():
        return [(ours[i], cut(torch.tensor([p])).logits[0, -1]) for i, p in enumerate(PROMPTS)]


def test_parallelize_module_gives_our_logits(tmp_path: Path) -> None:
    tiny.write("llama", tmp_path)
    for rank in run(both, layout=Layout(tp=2), args=(tmp_path,), timeout=120):
        for ours, theirs in rank:
            assert (ours - theirs).abs().max() <= 1e-4


def test_it_refuses_what_it_cannot_cut_evenly(tmp_path: Path) -> None:
    tiny.write("llama", tmp_path)
    with pytest.raises(RankError, match="3 ranks don't divide 6 query and 2 KV heads"):
        run(both, layout=Layout(tp=3), args=(tmp_path,), timeout=120)
