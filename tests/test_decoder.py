"""The decoder against transformers, in float32, on real ranks, in every layout of up to four."""

import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch

from labkit import Layout, run
from labkit.comm import Comm
from labkit.launch.local import RankError
from labkit.model import kernels
from labkit.model.attention import Batch, KVCache
from labkit.model.checkpoint import Checkpoint, fill
from labkit.model.config import ModelConfig
from labkit.model.decoder import Decoder, check_layout
from labkit.model.shapes import SHAPES
from labkit.parallel import overlap, pipeline
from labkit.parallel.expert import Spread
from labkit.split import LayoutError

LAYOUTS = [Layout(tp=t, pp=p, dp=d) for t in range(1, 5) for p in range(1, 5) for d in range(1, 5) if t * p * d <= 4]
PROMPTS = [[5, 9, 77, 100, 31, 0, 8], [44, 3, 60, 12, 12], [1]]
DECODED = [[17, 2, 90], [80, 81, 82], [99, 98, 4]]  # fed one by one after the prompts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.nn.Module]]:
    made = {}
    for family in tiny.FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        made[family] = (folder, tiny.write(family, folder, shards=family == "llama"))
    return made


def logits_of_all_families(comm: Comm, folders: dict[str, Path], mode: str = "none") -> dict[str, Any]:
    """Per family: logits after the prompts and after every decoded token."""
    return {family: _logits(comm, folder, mode) for family, folder in folders.items()}


@torch.inference_mode()
def _logits(comm: Comm, folder: Path, mode: str = "none") -> list[torch.Tensor]:
    decoder = _loaded(comm, folder, torch.float32)
    return _steps(comm, decoder, decoder.cache(blocks=12, size=4), mode)


def _loaded(comm: Comm, folder: Path, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(ModelConfig.read(folder), comm, dtype)
    fill(decoder.parameters(), Checkpoint(folder))
    return decoder


def _steps(comm: Comm, decoder: Decoder, cache: KVCache, mode: str = "none") -> list[torch.Tensor]:
    tables = [[3, 0, 7], [11, 2], [5]]  # not neighbours, not in order
    starts, tokens, out = [0, 0, 0], PROMPTS, []
    for step in range(4):
        comm.phase = "decode" if step else "prefill"
        ids = torch.tensor([i for t in tokens for i in t])
        x = ids if decoder.first else pipeline.expect(comm, decoder, len(ids)).wait()
        y = overlap.forward(comm, decoder, cache, x, overlap.cut(tokens, starts, tables, [True] * 3, mode))
        pipeline.pass_on(comm, y)
        out.append(decoder.head.gather(decoder.head(pipeline.share(comm, decoder, y, 3))))
        starts = [start + len(t) for start, t in zip(starts, tokens, strict=True)]
        tokens = [[ids[step]] for ids in DECODED] if step < 3 else []
    comm.flush()
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"tp{x.tp}-pp{x.pp}-dp{x.dp}")
def test_logits_are_transformers_logits(layout: Layout, checkpoints: dict) -> None:
    folders = {family: folder for family, (folder, _) in checkpoints.items()}
    ranks = run(logits_of_all_families, layout=layout, args=(folders,), timeout=120)
    for family, (_, reference) in checkpoints.items():
        for rank, result in enumerate(ranks):
            for i, (prompt, decoded) in enumerate(zip(PROMPTS, DECODED, strict=True)):
                expected = tiny.reference_logits(reference, prompt + decoded)[len(prompt) - 1 :]
                got = torch.stack([step[i] for step in result[family]])
                difference = (got - expected).abs().max().item()
                assert difference <= 1e-4, f"{family}, rank {rank}, prompt {i}: max difference {difference}"


@torch.inference_mode()
def in_one_call_and_layer_by_layer(comm: Comm, folders: list[Path]) -> list[tuple]:
    """Each model in each number format both ways: logits, the cache, what was counted; and how often C had all layers at once."""
    found = []
    for folder, dtype, one_call in product(folders, (torch.float32, torch.bfloat16), (True, False)):
        decoder = _loaded(comm, folder, dtype)
        pick = decoder.in_one_call
        decoder.in_one_call = lambda *args: pick(*args) if one_call else None  # noqa: B023
        cache = decoder.cache(blocks=12, size=16)
        comm.reset()
        before = comm.number
        with patch.object(kernels, "layers", side_effect=kernels.layers, autospec=True) as layers:
            logits = _steps(comm, decoder, cache)
        tallies = {key: (t.calls, t.payload_bytes, t.wire_bytes, t.seconds > 0) for key, t in comm.tallies.items()}
        found.append((layers.call_count, logits, cache.k + cache.v, tallies, comm.number - before))
    return found


@pytest.mark.skipif(kernels.library() is None, reason="no compiled kernels")
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, pp=2), Layout(tp=3)], ids=str)
def test_all_layers_in_one_call_are_the_same_to_the_bit(layout: Layout, checkpoints: dict) -> None:
    folders = [checkpoints[family][0] for family in ("mistral", "qwen2", "qwen3")]
    for rank in run(in_one_call_and_layer_by_layer, layout=layout, args=(folders,), timeout=120):
        for one, each in zip(rank[::2], rank[1::2], strict=True):
            assert (one[0], each[0]) == (3, 0)
            for mine, theirs in zip(one[1] + one[2], each[1] + each[2], strict=True):
                assert torch.equal(mine, theirs)
            assert one[3:] == each[3:]


@pytest.mark.skipif(kernels.library() is None, reason="no compiled kernels")
def test_a_rank_that_stays_away_from_a_step_is_named(checkpoints: dict) -> None:
    def decode(comm: Comm, folder: Path) -> None:
        decoder = _loaded(comm, folder, torch.float32)
        comm.barrier()
        x, batch = torch.ones(1, decoder.cfg.hidden), Batch.make([1], [0], [[0]], [True], 16, comm.device)
        cache, batch.rope = decoder.cache(blocks=1, size=16), decoder.rope.tables(batch.positions, torch.float32)
        if comm.rank == 0:
            kernels.layers(decoder.in_one_call(x, batch), decoder.in_c, batch.singles_in_c, x, cache.in_c, comm)
        time.sleep(30)

    said = r"all_reduce of attention or mlp on axis tp \(its operation 2\) failed .* Timed out waiting 1 s for rank 1"
    with pytest.raises(RankError, match=said):
        run(decode, 2, layout=Layout(tp=2), args=(checkpoints["qwen2"][0],), collective_timeout=1)


@pytest.mark.parametrize("mode", ["chunks", "two-batch"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, pp=2)], ids=lambda x: f"tp{x.tp}-pp{x.pp}")
def test_a_step_computed_in_parts_gives_the_same_logits(layout: Layout, mode: str, checkpoints: dict) -> None:
    folders = {family: folder for family, (folder, _) in checkpoints.items()}
    for shared_memory in (True, False):
        whole, cut = (
            run(logits_of_all_families, layout=layout, args=(folders, m), timeout=120, shared_memory=shared_memory)
            for m in ("none", mode)
        )
        for family in folders:
            for a, b in zip(whole[-1][family], cut[-1][family], strict=True):
                assert a.shape == b.shape
                assert (a - b).abs().max().item() <= 1e-5, f"{family}, shared memory: {shared_memory}"


def test_more_ranks_than_rows_of_the_head_are_refused() -> None:
    cfg = replace(ModelConfig.from_dict(SHAPES["tinyllama-1.1b"]), vocab=5)
    check_layout(cfg, Layout(pp=5), Spread())
    with pytest.raises(
        LayoutError, match="tensor_parallel_size=2 x pipeline_parallel_size=3 .* vocab_size 5.* at most 5"
    ):
        check_layout(cfg, Layout(tp=2, pp=3), Spread())
