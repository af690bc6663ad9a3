"""The CUDA path as far as it goes without a GPU: the same decoder and Comm on fake `cuda` tensors, group "fake".

Every shape and device of a real run is computed and checked by PyTorch, nothing is calculated. A CPU tensor that strays
into the model fails here. What this can't show: values, NCCL, speed.
"""

import subprocess
import sys

import pytest
import torch

from labkit.predict import dryrun

PROGRAM = """
import sys, torch, torch.distributed as dist
if len(sys.argv) > 3:
    torch.ops.load_library(sys.argv[3])
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from labkit.comm import Comm
from labkit.engine.graphs import DecodeGraphs
from labkit.mesh import Layout, Mesh
from labkit.model.decoder import Decoder
from labkit.model.find import find
from labkit.parallel import overlap, pipeline

rank, fault = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=16)
torch.cuda.get_device_capability = lambda device=None: (9, 0)  # a broadcast asks
with FakeTensorMode(), torch.inference_mode():
    comm = Comm(Mesh(Layout(tp=8, pp=2), torch.device("cuda")), timed=False)
    decoder = Decoder(find("random:llama-3.1-405b").config, comm, torch.bfloat16)
    cache = decoder.cache(blocks=3, size=64)
    for tokens, starts in (([[1] * 9, [2] * 4], [0, 0]), ([[1], [2]], [9, 4])):
        ids = torch.tensor([i for t in tokens for i in t], device=comm.device)
        x = ids if decoder.first else pipeline.expect(comm, decoder, len(ids)).wait()
        y = overlap.forward(comm, decoder, cache, x, overlap.cut(tokens, starts, [[2], [0]], [True, True]))
        if max(map(len, tokens)) == 1:  # the same step as a CUDA graph would repeat it: filled up, from memory of its own
            graphs = DecodeGraphs(decoder, cache, comm, lambda compute: compute)
            with comm.apart():
                again = [graphs.forward(x, *overlap.cut(tokens, starts, [[2], [0]], [True, True])) for _ in range(3)]
            assert all(z.shape == y.shape and z.device == y.device for z in again)
        if fault == "cpu mask":
            y = y + torch.ones(y.shape)
        if fault == "cpu collective":
            comm.all_reduce(torch.ones(4, device="cpu"), "tp")
        assert y.device.type == "cuda", y.device
        assert y.shape == (2 if decoder.last else len(ids), 16384), y.shape
        pipeline.pass_on(comm, y)
        logits = decoder.head(pipeline.share(comm, decoder, y, 2))
        assert logits.shape == (2, 128256 // 16), logits.shape
        assert decoder.head.argmax(logits).shape == (2,)
        assert decoder.head.gather(logits).shape == (2, 128256)
    print(decoder.weights_bytes, cache.bytes, comm.tallies["all_reduce", "tp", "", "mlp"].calls)
"""


@pytest.fixture(scope="module")
def guard() -> list[str]:
    """A build of torch without CUDA needs a device guard that does nothing; with CUDA there is one already."""
    library = dryrun.guard()
    if library is None and not torch.version.cuda:
        pytest.skip("no C++ compiler to build the two-line CUDA device guard that fake tensors need on a CPU build")
    return [str(library)] if library else []


def program(rank: int, fault: str, guard: list[str]) -> subprocess.CompletedProcess[str]:
    # A process of its own: the guard and the fake default group would stay behind in this one.
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rank), fault, *guard], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("rank", [0, 15], ids=["first stage", "last stage"])
def test_405b_over_16_fake_gpus(rank: int, guard: list[str]) -> None:
    done = program(rank, "", guard)
    assert done.returncode == 0, done.stderr[-2000:]
    weights, kv, reduces = map(int, done.stdout.split())
    assert weights == pytest.approx(405_853_388_800 * 2 / 16, rel=0.01)
    assert kv == 63 * 2 * 3 * 64 * 1 * 128 * 2  # layers, K and V, slots, length, KV heads, head size, bytes
    assert reduces == 2 * 63  # two steps, one all-reduce behind each layer's MLP


@pytest.mark.parametrize("fault", ["cpu mask", "cpu collective"])
def test_a_stray_cpu_tensor_is_caught(fault: str, guard: list[str]) -> None:
    done = program(0, fault, guard)
    assert done.returncode != 0
    assert "cpu" in done.stderr.splitlines()[-1]
