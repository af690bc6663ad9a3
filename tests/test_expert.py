"""Expert parallelism on real ranks: one rank's numbers in every layout and exchange, and the bytes that routing calls for."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from labkit import LLM, Layout, SamplingParams, run, split
from labkit.comm import Comm
from labkit.model.checkpoint import Checkpoint, RandomWeights, fill
from labkit.model.config import ModelConfig
from labkit.model.decoder import Decoder
from labkit.model.errors import ModelError
from labkit.model.experts import Experts
from labkit.parallel import overlap, pipeline
from labkit.parallel.expert import EXCHANGES, MoE, Spread

LAYOUTS = [
    Layout(tp=t, pp=p, dp=d, expert_parallel=True)
    for t in range(1, 5) for p in range(1, 5) for d in range(1, 5) if t * p * d <= 4 and t * d > 1
]  # fmt: skip
PROMPTS = [[5, 9, 77, 100, 31, 0, 8], [44, 3, 60, 12, 12], [1]]
DECODED = [[17, 2, 90], [80, 81, 82], [99, 98, 4]]  # fed one by one after the prompts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.nn.Module]]:
    folders = {family: tmp_path_factory.mktemp(family) for family in tiny.MOE}
    return {family: (folder, tiny.write(family, folder)) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def expected_logits(checkpoints: dict) -> dict[str, list[torch.Tensor]]:
    """Of each family and prompt, transformers' logits after the prompt and after each decoded token."""
    return {
        family: [
            tiny.reference_logits(reference, prompt + decoded)[len(prompt) - 1 :]
            for prompt, decoded in zip(PROMPTS, DECODED, strict=True)
        ]
        for family, (_, reference) in checkpoints.items()
    }


def logits_and_tallies(comm: Comm, folders: dict[str, Path], spread: Spread) -> dict[str, Any]:
    """Per family: logits of this rank's replica after its prompts and each decoded token; and what the prompts sent."""
    return {family: _logits_and_tallies(comm, folder, spread) for family, folder in folders.items()}


@torch.inference_mode()
def _logits_and_tallies(comm: Comm, folder: Path, spread: Spread) -> tuple[list[torch.Tensor], dict]:
    dp, replica = comm.mesh.layout.dp, comm.mesh.dp_rank
    decoder = Decoder(ModelConfig.read(folder), comm, torch.float32, spread)
    fill(decoder.parameters(), Checkpoint(folder))
    cache = decoder.cache(blocks=3, size=16)
    comm.reset()
    out, sent = [], {}
    for step in range(4):
        tokens = PROMPTS if step == 0 else [[ids[step - 1]] for ids in DECODED]
        replicas = [sum(map(len, tokens[r::dp])) for r in range(dp)]
        mine = tokens[replica::dp]  # none for the fourth replica
        starts = [0 if step == 0 else len(p) + step - 1 for p in PROMPTS[replica::dp]]
        ids = torch.tensor([i for t in mine for i in t], dtype=torch.int64)
        parts = overlap.cut(mine, starts, [[i] for i in range(len(mine))], [True] * len(mine))
        x = ids if decoder.first else pipeline.expect(comm, decoder, len(ids)).wait()
        y = overlap.forward(comm, decoder, cache, x, parts, replicas)
        pipeline.pass_on(comm, y)
        if mine:
            out.append(decoder.head.gather(decoder.head(pipeline.share(comm, decoder, y, len(mine)))))
        if step == 0:
            sent = {(op, axis, what): (t.calls, t.wire_bytes) for (op, axis, _, what), t in comm.tallies.items()}
    comm.flush()
    return out, sent


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"tp{x.tp}-pp{x.pp}-dp{x.dp}")
def test_logits_are_transformers_logits(
    layout: Layout, exchange: str, checkpoints: dict, expected_logits: dict
) -> None:
    # Qwen3-MoE with four experts has one layer of two with experts; the others have 6 and 7, uneven over 4 ranks.
    folders = {family: folder for family, (folder, _) in checkpoints.items()}
    ranks = run(logits_and_tallies, layout=layout, args=(folders, Spread(exchange, "round-robin")), timeout=120)
    for rank, result in enumerate(ranks):
        place = layout.place(rank)
        if place["pp"] < layout.pp - 1:
            continue
        for family, expected in expected_logits.items():
            logits, _ = result[family]
            mine = expected[place["dp"] :: layout.dp]
            assert len(logits) == (4 if mine else 0)
            for i, wanted in enumerate(mine):
                difference = (torch.stack([step[i] for step in logits]) - wanted).abs().max().item()
                assert difference <= 1e-4, f"{family}, rank {rank}, prompt {i}: max difference {difference}"


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "sockets"])
@pytest.mark.parametrize("dp", [2, 3, 4])
def test_bytes_are_those_that_the_routing_table_calls_for(dp: int, shared_memory: bool, checkpoints: dict) -> None:
    folder, reference = checkpoints["mixtral"]
    layout = Layout(dp=dp, expert_parallel=True)
    args = ({"mixtral": folder}, Spread())
    ranks = run(logits_and_tallies, layout=layout, args=args, timeout=120, shared_memory=shared_memory)
    cfg = ModelConfig.read(folder)
    # transformers' own routing: of each prompt and layer the two experts of each token
    tables = [
        [
            layer.topk(2).indices.tolist()
            for layer in reference(torch.tensor([p]), output_router_logits=True).router_logits
        ]
        for p in PROMPTS
    ]
    owner = {e: rank for rank, mine in enumerate(split.experts(6, dp)) for e in mine}
    for rank, result in enumerate(ranks):
        _, sent = result["mixtral"]
        dispatched = combined = (
            0  # rows that leave this rank: tokens for other ranks' experts, and results for other ranks
        )
        for home in range(dp):
            for layer in range(cfg.layers):
                for token in (experts for table in tables[home::dp] for experts in table[layer]):
                    goes_to = {owner[e] for e in token} - {home}  # once to each rank, whatever it has of its experts
                    dispatched += len(goes_to) if home == rank else 0
                    combined += rank in goes_to
        rows = cfg.hidden * 4  # bytes of one, in float32
        widest = max(sum(map(len, PROMPTS[r::dp])) for r in range(dp))
        assert sent == {
            ("all_gather", "ep", "counts"): (cfg.layers, cfg.layers * (dp - 1) * widest * 2 * 2 * 4),
            ("all_to_all", "ep", "dispatch"): (cfg.layers, dispatched * rows),
            ("all_to_all", "ep", "combine"): (cfg.layers, combined * rows),
        }


class RoutedByContent(torch.nn.Module):
    """A router that reads a token's experts and weights from its first features, so that a test can choose them."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, : self.k].long(), x[:, self.k : 2 * self.k]


def _cases(
    seed: int, ranks: int, experts: int, k: int, hidden: int
) -> list[tuple[list[torch.Tensor], list[list[int]]]]:
    """Tokens of each rank, and the placement; all alike on every rank."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cases = []
    for number in range(12):
        counts = [rng.choice([0, 0, 1, 3, 17]) for _ in range(ranks)]
        counts[rng.randrange(ranks)] = 5
        xs = [torch.randn(n, hidden, generator=generator) for n in counts]
        for x in xs:
            for row in x:  # in every fourth case all tokens want the same experts
                row[:k] = torch.tensor(range(k) if number % 4 == 0 else rng.sample(range(experts), k))
        order = rng.sample(range(experts), experts)
        cuts = [0, *sorted(rng.sample(range(1, experts), ranks - 1)), experts]
        cases.append((xs, [order[a:b] for a, b in pairwise(cuts)]))
    return cases


@torch.inference_mode()
def largest_difference(comm: Comm, seed: int, tp: int) -> float:
    """Of any exchange and case from the same layer computed by this rank alone."""
    cfg = ModelConfig.from_dict({
        "model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 12, "vocab_size": 9,
        "num_attention_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2,
    })  # fmt: skip
    assert cfg.moe
    mesh, worst = comm.mesh, 0.0
    alone = Experts(cfg, cfg.moe, "model.layers.0", range(6), range(12), torch.float32, comm.device)
    fill(alone.parameters(), RandomWeights(std=0.3))
    for xs, placement in _cases(seed, mesh.size("ep"), 6, 2, 16):
        xs = xs[::tp]  # one batch of tokens for each replica
        x = xs[mesh.dp_rank]
        experts, weights = RoutedByContent(2)(x)
        expected = alone(x, experts, weights, torch.bincount(experts.flatten(), minlength=6).tolist())
        for exchange in EXCHANGES:
            moe = MoE(cfg, cfg.moe, 0, comm, Spread(exchange, {0: placement}), torch.float32, comm.device)
            fill(moe.experts.parameters(), RandomWeights(std=0.3))
            moe.router = RoutedByContent(2)
            got = overlap.alone(comm, moe(x, [len(each) for each in xs]))
            if len(x):
                worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
            assert got.shape == expected.shape
            total = comm.all_reduce(moe.load.clone(), "ep")
            assert (
                total.tolist()
                == torch.bincount(torch.cat([y[:, :2] for y in xs]).long().flatten(), minlength=6).tolist()
            )
    return worst


@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_any_token_counts_routing_and_placement(dp: int, tp: int) -> None:
    """Uneven experts, ranks without tokens, all tokens for the experts of one rank."""
    layout = Layout(dp=dp, tp=tp, expert_parallel=True)
    for worst in run(largest_difference, layout=layout, args=(20 + dp, tp), timeout=120):
        assert worst <= 1e-5


TINY_LAYOUTS = [{"dp": 1}, {"dp": 2}, {"dp": 3}, {"dp": 4}, {"tp": 2}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}]
TINY_PROMPTS = ["And it came to pass", "In the beginning", "Then said he unto", "The", "Behold, the king of"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny_moe_tokens() -> list[list[int]]:
    """What transformers generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from labkit.model.find import TINY_MOE

    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    return [tiny.greedy(model, tokenizer(p).input_ids, GREEDY.max_tokens) for p in TINY_PROMPTS]


@pytest.mark.parametrize("degrees", TINY_LAYOUTS, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()))
def test_greedy_tokens_of_tiny_moe_are_those_of_transformers(degrees: dict, tiny_moe_tokens: list) -> None:
    for exchange in EXCHANGES:
        with LLM(
            "tiny-moe", tensor_parallel_size=degrees.get("tp", 1), pipeline_parallel_size=degrees.get("pp", 1),
            data_parallel_size=degrees.get("dp", 1), enable_expert_parallel=True, expert_exchange=exchange,
            dtype="float32", max_model_len=256, debug=True,
        ) as llm:  # fmt: skip
            outputs = llm.generate(TINY_PROMPTS, GREEDY)
            report = llm.report()
        assert [o.outputs[0].token_ids for o in outputs] == tiny_moe_tokens, exchange
        assert report["layout"]["ep"] == degrees.get("dp", 1) * degrees.get("tp", 1)
        _check_experts(report, sum(len(o.prompt_token_ids) + 31 for o in outputs))


def _check_experts(report: dict, tokens: int) -> None:
    """The report's loads, and its bytes against those that Comm counted by itself."""
    experts = report["experts"]
    for layer in experts["layers"]:
        assert sum(layer["tokens"]) == tokens * 2
        assert layer["busiest_over_mean"] == split.busiest_over_mean(layer["tokens"], layer["placement"]) >= 1
    if experts["exchange"] == "all_to_all":
        rows = {c["what"]: 0 for c in report["comm"] if c["op"] == "all_to_all"}
        assert experts["bytes"].keys() == rows.keys() == {"dispatch", "combine"}
        dispatch, combine = experts["bytes"]["dispatch"], experts["bytes"]["combine"]
        assert [list(column) for column in zip(*dispatch, strict=True)] == combine  # what came goes back
    else:
        assert not experts["bytes"]


def test_fewer_requests_than_replicas_and_replicas_that_end_early() -> None:
    with LLM("tiny-moe", data_parallel_size=2, enable_expert_parallel=True, dtype="float32", max_model_len=128) as llm:
        [alone] = llm.generate("In the beginning", GREEDY)
        short = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        many = llm.generate(["In the beginning", "And", "And he", "And"], [GREEDY, short, short, short])
    assert many[0].outputs[0].token_ids == alone.outputs[0].token_ids
    assert [len(o.outputs[0].token_ids) for o in many] == [32, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data_parallel_size": 9}, split.LayoutError, "9 expert-parallel ranks .* 8 experts: use 1 to 8"),
        ({"expert_exchange": "gossip"}, ValueError, "expert_exchange='gossip': use 'all_to_all'"),
        ({"expert_placement": "random"}, split.LayoutError, "'random': use 'contiguous', 'round-robin'"),
        ({"expert_placement": {0: [[0, 1, 2, 3], [4, 5, 6, 6]]}, "data_parallel_size": 2}, split.LayoutError, "layer 0.* once"),
        ({"overlap": "chunks", "data_parallel_size": 2}, ValueError, "overlap='chunks'.*not supported"),
        ({"model": "random:tinyllama-1.1b"}, ModelError, "random:tinyllama-1.1b has no experts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_ranks_start(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LLM(**{"model": "tiny-moe", "enable_expert_parallel": True, **options})
