"""The same tensor-parallel plan by PyTorch's own means, on a model of transformers: what ours is compared with.

torch.distributed.tensor cuts each nn.Linear and puts in the all-reduce that `RowParallelLinear` writes out by hand. It
divides evenly only: the degree must divide the numbers of query and of KV heads (for SmolLM2's 9 and 3: tp = 3).
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from labkit.comm import Comm
from labkit.split import LayoutError

PLAN: dict[str, Callable[[], ParallelStyle]] = {
    "self_attn.q_proj": ColwiseParallel,
    "self_attn.k_proj": ColwiseParallel,
    "self_attn.v_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def parallelize(model: Any, comm: Comm) -> nn.Module:
    """Cuts every layer of a Llama-like transformers model over all ranks, in place; embedding and head stay whole.

    Raises LayoutError when the world size doesn't divide the heads.
    """
    heads, kv_heads, tp = model.config.num_attention_heads, model.config.num_key_value_heads, comm.world_size
    if heads % tp or kv_heads % tp:
        raise LayoutError(
            f"parallelize_module cuts evenly: {tp} ranks don't divide {heads} query and {kv_heads} KV heads"
        )
    mesh = init_device_mesh(comm.device.type, (tp,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {name: style() for name, style in PLAN.items()})
    return model
