"""The same engine on real GPUs: NCCL with a GPU per rank, gloo through the host when ranks share one. `pytest -m gpu`."""

import pytest
import torch
from test_serving import GREEDY, llm_of

from labkit import LLM, run
from labkit.comm import Comm
from labkit.mesh import Layout, pick_backend
from labkit.parallel.expert import EXCHANGES

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="needs a GPU, and -m gpu")
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2), Layout(tp=3)],
    ids=lambda x: f"tp{x.tp}-pp{x.pp}",
)
@pytest.mark.parametrize("share", [False, True], ids=["nccl", "gloo, shared GPU"])
def test_greedy_tokens_on_gpus(layout: Layout, share: bool, questions_and_answers: tuple) -> None:
    if not share and layout.world > GPUS:
        pytest.skip(f"NCCL needs a GPU per rank: {layout.world}; {GPUS} here")
    if share and layout.world <= GPUS:
        pytest.skip(f"{layout.world} ranks have a GPU each here ({GPUS}), so none is shared")
    prompts, expected = questions_and_answers
    with llm_of(layout, dtype="float32") as llm:
        outputs = llm.generate(prompts, GREEDY)
        report = llm.report()
    assert report["backend"] == pick_backend(layout.world)[0] == ("gloo" if share else "nccl")
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert layout.world == 1 or all(entry["ms_per_token"] > 0 for entry in report["comm"])


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="needs a GPU, and -m gpu")
@pytest.mark.parametrize("tp", [1, 2])
def test_cuda_graphs_change_no_token_and_are_timed(tp: int) -> None:
    if tp > GPUS:
        pytest.skip(f"NCCL needs a GPU per rank: {tp}; {GPUS} here")
    prompts = [[7 * j + i for j in range(n)] for i, n in enumerate((3, 30, 270, 9, 77))]
    found = []
    for eager in (True, False):
        with LLM(dtype="float32", tensor_parallel_size=tp, enforce_eager=eager) as llm:
            tokens = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
            decode = {e["what"]: e["calls_per_token"] for e in llm.report()["comm"] if e["phase"] == "decode"}
            assert all(entry["ms_per_token"] > 0 for entry in llm.report()["comm"])
            found.append((tokens, decode))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs, and -m gpu")
def test_symmetric_memory_adds_up_as_nccl_does() -> None:
    def sums(comm: Comm) -> tuple[bool, list[bool]]:
        same = []
        for n in (4, 576, 8192):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.arange(n, device=comm.device).to(dtype) % 97 + comm.rank
                same.append(torch.equal(comm.all_reduce(x.clone(), "tp"), 2 * (x - comm.rank) + 1))
        return "tp" in comm.shared, same

    for joined, same in run(sums, 2):
        assert joined and all(same)


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="needs a GPU, and -m gpu")
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_expert_parallel_tokens_on_gpus(exchange: str) -> None:
    tokens = []
    for options in ({}, {"data_parallel_size": 2, "enable_expert_parallel": True, "expert_exchange": exchange}):
        with LLM("tiny-moe", dtype="float32", max_model_len=256, **options) as llm:
            outputs = llm.generate(["And it came to pass", "In the beginning", "The"], GREEDY)
        tokens.append([o.outputs[0].token_ids for o in outputs])
    assert tokens[0] == tokens[1]
