"""Our tensor parallelism against PyTorch's own parallelize_module, on the same checkpoint and the same ranks."""

from pathlib import Path

import tiny
import torch
from test_decoder import PROMPTS, _logits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from labkit import Layout, run
from labkit.comm import Comm

COLUMN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW = ("self_attn.o_proj", "mlp.down_proj")


def both(comm: Comm, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits after each prompt: ours, and those of transformers cut by PyTorch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mesh = init_device_mesh(comm.device.type, (comm.world_size,))
    for layer in model.model.layers:
        plan = {name: ColwiseParallel() for name in COLUMN} | {name: RowwiseParallel() for name in ROW}
        parallelize_module(layer, mesh, plan)
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] * comm.world_size == 48
    ours = _logits(comm, folder)[0]
    with torch.inference_mode():
        return [(ours[i], model(torch.tensor([p])).logits[0, -1]) for i, p in enumerate(PROMPTS)]


def test_parallelize_module_gives_our_logits(tmp_path: Path) -> None:
    tiny.write("llama", tmp_path)
    for rank in run(both, layout=Layout(tp=2), args=(tmp_path,), timeout=120):
        for ours, theirs in rank:
            assert (ours - theirs).abs().max() <= 1e-4
