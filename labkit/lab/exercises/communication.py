"""What ranks say to each other: a ring by hand, its bytes in a served model, and programs that wait for ever."""

import json
import random
import tempfile
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from labkit import split
from labkit.engine.llm import LLM
from labkit.engine.requests import SamplingParams
from labkit.lab.exercise import Case, Exercise, Misconception, PerRank, Traffic
from labkit.lab.exercises.memory import LLAMA_70B, Shape, counted
from labkit.predict.dryrun import dryrun

Parts = list[torch.Tensor]  # one per rank


def _tensors(rng: random.Random, *sizes: tuple[int, ...]) -> PerRank:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return PerRank(torch.randn(size, generator=generator) for size in sizes)


# -- a ring all-reduce -------------------------------------------------------------------------------------------------


def _ring_cases(rng: random.Random) -> list[Case]:
    """Sizes that the number of ranks doesn't divide."""
    sizes = {ranks: ranks * rng.randrange(3, 7) + 1 for ranks in (2, 3, 4)}
    return [Case((_tensors(rng, *[(n,)] * ranks),), f"{n} numbers", ranks) for ranks, n in sizes.items()]


def _ring(
    xs: Parts, n: int, *, ceil: bool, first: int, reduce: str = "add", gather: str = "copy", slip: int = 0
) -> Parts:
    """What `n` ranks end with when each chunk goes round twice, with the mistakes that are asked for.

    Learners may choose how to cut (evenly, or all but the last of one size) and with which chunk rank 0 begins.
    """
    size = -(-len(xs[0]) // n)
    sizes = [len(x) for x in xs[0].split(size)] if ceil else [len(part) for part in split.even(len(xs[0]), n)]
    chunks = [list(x.clone().split(sizes)) for x in xs]
    for start, how in ((first, reduce), (first + 1 + slip, gather)):
        for step in range(0 if how == "skip" else n - 1):
            moving = [chunks[rank][(rank + start - step) % n].clone() for rank in range(n)]
            for rank in range(n):
                at, got = (rank - 1 + start - step) % n, moving[rank - 1]
                chunks[rank][at] = chunks[rank][at] + got if how == "add" else got
    if gather == "own":
        return [chunks[rank][(rank + first + 1) % n] for rank in range(n)]
    return [torch.cat(mine) for mine in chunks]


def _wrong_ring(name: str, why: str, **mistake: Any) -> list[Misconception]:
    """One for each way to cut and to begin."""
    ways = product((False, True), (0, -1))
    return [Misconception(name, why, partial(_ring, ceil=ceil, first=first, **mistake)) for ceil, first in ways]


def _running_totals(xs: Parts, n: int) -> Parts:
    totals = xs
    for _ in range(n - 1):
        totals = [totals[rank] + totals[rank - 1] for rank in range(n)]
    return totals


def _without_rest(xs: Parts, n: int, *, keep: bool) -> Parts:
    whole = len(xs[0]) // n * n
    total = torch.stack(xs).sum(0)[:whole]
    return [torch.cat([total, x[whole:]]) if keep else total for x in xs]


def _ring_cost(case: Case, traffic: Traffic) -> str:
    n, x = case.ranks, case.args[0][0]
    sends, steps, most = traffic.calls.get("send", 0), 2 * (n - 1), 2 * (n - 1) * -(-len(x) // n) * x.itemsize
    if others := sorted(set(traffic.calls) - {"send"}):
        return f"the sum is right, but comm.{others[0]} made it. Here only comm.send and comm.recv may move bytes."
    if not sends:
        return "the sum is right, but comm counted nothing. Send and receive through comm, which counts."
    if traffic.wire_bytes > most:
        times = traffic.wire_bytes / x.nbytes
        whole = " That is the whole tensor sent round, n - 1 times." if times == n - 1 else ""
        return (
            f"the sum is right, but with {n} ranks one of them sent {traffic.wire_bytes} bytes for a tensor of {x.nbytes}, "
            f"{times:.2f}x the payload.{whole} In chunks it is 2 (n - 1) / n = {steps / n:.2f}x."
        )
    if sends != steps:
        return (
            f"the sum is right, but with {n} ranks one of them made {sends} send(s). A ring has 2 (n - 1) = {steps} steps, "
            "and in each of them every rank sends one chunk."
        )
    return ""


RING = Exercise(
    name="communication.ring_all_reduce",
    call="ring_all_reduce(x, comm)",
    cases=_ring_cases,
    reference=lambda xs, n: [torch.stack(xs).sum(0)] * n,
    spmd=True,
    points=3,
    tolerance=1e-4,
    rule=_ring_cost,
    misconceptions=(
        Misconception("every rank returns its own x", "Nothing was added up.", lambda xs, n: xs),
        *_wrong_ring("it stops after the reduce-scatter",
            "Each rank then has one chunk that is complete. Send the complete chunks round once more.", gather="skip"),
        *_wrong_ring("each rank returns only the chunk that is complete on it",
            "The complete chunks must go round once more, so that every rank ends with all.", gather="own"),
        *_wrong_ring("the first phase replaces chunks instead of adding, or the second begins where the first began",
            "In the first n - 1 steps a chunk must collect a contribution from every rank that it visits. The second phase must "
            "begin with the chunk that was received last, which is complete: one further than the first.", reduce="copy"),
        *_wrong_ring("the second phase adds what it receives instead of putting it in place",
            "A complete chunk already holds everybody's numbers.", gather="add"),
        *_wrong_ring("the second phase begins with the wrong chunk (an index off by one)",
            "It must begin with the chunk that was received last: that one is complete.", slip=1),
        Misconception("each rank passes on its running total instead of what it received",
            "Numbers that were added once are then sent on and added again.", _running_totals),
        Misconception("only one step is taken", "Each rank has its own numbers and its neighbour's; there are n ranks.",
            lambda xs, n: [xs[rank] + xs[rank - 1] for rank in range(n)]),
        Misconception("the sum is divided by the number of ranks", "That is the mean; an all-reduce gives the sum.",
            lambda xs, n: [torch.stack(xs).mean(0)] * n),
        *(Misconception("the remainder is dropped", "len(x) // n numbers in each of n chunks leave the last len(x) % n out.",
            partial(_without_rest, keep=keep)) for keep in (True, False)),
    ),
    hints=(
        "Cut x into n chunks. In each of the first n - 1 steps send one chunk to rank + 1, and add what comes from rank - 1 to "
        "the chunk before it. Which chunk is complete on this rank then?",
        "In step s rank r sends chunk (r - s) % n and adds what it receives to chunk (r - s - 1) % n. In the end chunk "
        "(r + 1) % n is complete. Then n - 1 steps more, beginning with that chunk, and nothing is added.",
        "chunks = list(x.clone().tensor_split(n)). First: comm.send(chunks[(r - s) % n], (r + 1) % n), i = (r - s - 1) % n, "
        "chunks[i] = chunks[i] + comm.recv(torch.empty_like(chunks[i]), (r - 1) % n). Second: send chunk (r + 1 - s) % n, "
        "receive into a new tensor, put it at (r - s) % n. At the end torch.cat(chunks).",
    ),
    moral="2 (n - 1) sends of an n-th each: nearly twice the payload on the wire, however many ranks. Steps grow, bytes don't.",
)  # fmt: skip


# -- its bytes in a served model ---------------------------------------------------------------------------------------


def served(model: Shape, prompts: list[list[int]], tokens: int, **options: Any) -> dict[str, Any]:
    """The report of real ranks that generated `tokens` for each prompt. options: of `LLM`."""
    config, dtype = model.config()
    sizes = {
        "model_type": "llama", "num_hidden_layers": config.layers, "hidden_size": config.hidden, "head_dim": config.head_dim,
        "intermediate_size": config.intermediate, "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocab,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(sizes), encoding="utf-8")
        limits = {"max_model_len": max(map(len, prompts)) + tokens, "max_num_seqs": len(prompts), "threads": 1}
        with LLM(f"random:{file}", dtype=str(dtype).removeprefix("torch."), **limits | options) as llm:
            llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
            return llm.report()


@lru_cache(maxsize=64)
def sent(model: Shape, tp: int) -> float:
    """Bytes that one of `tp` ranks sends in the all-reduces of all layers for one decoded token, as the engine counts them: on
    real ranks, or in a dry run of what is too large for this machine."""
    if model == LLAMA_70B:
        rows = dryrun("llama-2-70b", tp=tp, context=16, device="cpu")["comm"]
    else:
        rows = served(model, [[1, 2, 3]], 3, tensor_parallel_size=tp)["comm"]
    ours = [r for r in rows if r["phase"] == "decode" and r["op"] == "all_reduce" and r["what"] in ("attention", "mlp")]
    return sum(r["wire_bytes_per_token"] for r in ours)


def _served_cases(rng: random.Random) -> list[Case]:
    def shape(element: int) -> Shape:
        hidden, kv_heads = 48 * rng.randrange(2, 7), rng.choice((4, 12))
        return Shape(rng.randrange(2, 6), hidden, hidden * 3 + 16, 12, kv_heads, 8, 96, False, element)

    layouts = [(shape(2), 1), (shape(2), 2), (shape(4), 3), (shape(2), 4), (LLAMA_70B, 4)]
    return [Case((model, tp), f"{model}, tp={tp}") for model, tp in layouts]


def _payload(m: Shape) -> int:
    return 2 * m.layers * m.hidden * m.bytes_per_param


BYTES = Exercise(
    name="communication.bytes_per_token",
    call="bytes_per_token(model, tp)",
    cases=_served_cases,
    reference=sent,
    points=2,
    unit=("B", 1.0),
    misconceptions=(
        Misconception("tp all-reduces are counted in each layer, or a rank sends its tensor whole to each of the others",
            "There are two in each layer, one after attention and one after the MLP, at any degree: 2, not 8, at TP=8. And in "
            "each a rank sends chunks, 2 (t - 1) / t of its payload, not (t - 1) times all of it.",
            lambda m, tp: sent(m, tp) * tp / 2),
        Misconception("one all-reduce is counted in each layer, or the ring is gone round only once",
            "There are two in each layer, after attention and after the MLP; and in each a rank sends (t - 1) / t of the payload "
            "twice, to add up and to hand out.", lambda m, tp: sent(m, tp) / 2),
        Misconception("the payload is counted instead of the wire",
            "A rank of a ring sends 2 (t - 1) / t of its payload: nothing with one rank, 1.5x with four.",
            lambda m, tp: _payload(m)),
        Misconception("a number takes 4 bytes", "That is float32; here it takes bytes_per_param.",
            lambda m, tp: sent(m, tp) * 4 / m.bytes_per_param),
        Misconception("numbers are counted, not bytes", "Each of them takes bytes_per_param bytes.",
            lambda m, tp: sent(m, tp) / m.bytes_per_param),
        Misconception("the MLP's all-reduce is taken to be as wide as its intermediate activation",
            "The wide activation stays on its rank. What is added up is the result of the down projection, hidden numbers wide.",
            lambda m, tp: sent(m, tp) * (m.hidden + m.intermediate) / (2 * m.hidden)),
        Misconception("all ranks are counted together", "What one rank sends is asked for.", lambda m, tp: sent(m, tp) * tp),
        Misconception("the hidden state is divided by tp",
            "A row-parallel product leaves partial sums of all hidden numbers on every rank, so the whole vector is added up.",
            lambda m, tp: sent(m, tp) / tp),
        Misconception("the embedding's all-reduce is counted too",
            "Here only the layers count: two all-reduces in each. (In 80 layers one more would be 0.6 %.)",
            lambda m, tp: sent(m, tp) * (2 * m.layers + 1) / (2 * m.layers)),
        Misconception("weights are counted", "Weights stay where they are; activations travel.",
            lambda m, tp: counted(m, 1)[0] / tp),
    ),
    hints=(
        "How many all-reduces does one layer make, and how many numbers does each add up for one token?",
        "Payload: two all-reduces in each layer, of `hidden` numbers. What does a rank of a ring send for each byte of it?",
        "2 * layers * hidden * bytes_per_param * 2 * (tp - 1) / tp.",
    ),
    moral="2L all-reduces of one hidden vector: bytes grow with layers, width and tokens, and hardly with the degree.",
)  # fmt: skip


# -- programs that wait for ever ---------------------------------------------------------------------------------------


def _totals_cases(rng: random.Random) -> list[Case]:
    return [Case((_tensors(rng, *[(k,)] * n),), f"{k} numbers", n) for n in (2, 3) for k in [rng.randrange(2, 6)]]


def _batches_cases(rng: random.Random) -> list[Case]:
    counts = {n: rng.sample(range(1, 7), n) for n in (2, 3)}
    return [Case((_tensors(rng, *((k, 4) for k in ks)),), f"{ks} batches", n) for n, ks in counts.items()]


def _one_send(case: Case, traffic: Traffic) -> str:
    right = "every rank got the right tensor, but "
    if others := sorted(set(traffic.calls) - {"send"}):
        return f"{right}through comm.{others[0]}, to which every rank contributes. One send and one receive are enough."
    sends = traffic.calls.get("send", 0)
    return "" if sends == 1 else f"{right}a rank made {sends} sends through comm; one is enough."


_ALONE = "A program without communication cannot hang, but neither can it know what the others have."

SOME_RANKS = Exercise(
    name="communication.deadlock_a",
    call="total_tokens(tokens, comm)",
    cases=_totals_cases,
    reference=lambda xs, n: [torch.stack(xs).sum(0)] * n,
    spmd=True,
    tolerance=1e-4,
    misconceptions=(
        Misconception("the ranks no longer talk to each other", _ALONE, lambda xs, n: xs),
        Misconception("only rank 0 has the total",
            "Here every rank must return it.", lambda xs, n: [torch.stack(xs).sum(0), *xs[1:]]),
        Misconception("the other ranks take part with zeros, or get rank 0's numbers",
            "Nobody hangs, but nobody's numbers are added to rank 0's: each rank must bring its own.", lambda xs, n: [xs[0]] * n),
    ),
    hints=(
        "Which ranks reach the all-reduce? What do the others do?",
        "An all-reduce needs every rank of its group, also those that have no use for the result.",
        "Call comm.all_reduce(tokens) outside the if; what depends on the rank is only what is done with the total.",
    ),
    moral="A collective inside `if comm.rank == ...` is the commonest hang there is. Communicate on all, then act on one.",
)  # fmt: skip

UNEVEN = Exercise(
    name="communication.deadlock_b",
    call="total_loss(batches, comm)",
    cases=_batches_cases,
    reference=lambda xs, n: [torch.cat(xs).sum()] * n,
    spmd=True,
    tolerance=1e-4,
    misconceptions=(
        Misconception("the ranks no longer talk to each other", _ALONE, lambda xs, n: [x.sum() for x in xs]),
        Misconception("only as many batches are counted as every rank has",
            "The loops are equally long now, but the other batches are lost.",
            lambda xs, n: [torch.stack([x[: min(map(len, xs))].sum() for x in xs]).sum()] * n),
        Misconception("ranks that have run out repeat their last batch",
            "They must go on taking part, but with zeros: a batch counts once.",
            lambda xs, n: [torch.stack([x.sum() + (max(map(len, xs)) - len(x)) * x[-1].sum() for x in xs]).sum()] * n),
        Misconception("the sum is divided by the number of ranks", "The total over all ranks is asked for.",
            lambda xs, n: [torch.cat(xs).sum() / n] * n),
    ),
    hints=(
        "How many all-reduces does each rank enter? The case says how many batches each of them has.",
        "The number of collectives must not depend on what only one rank knows. Agree on a number first, or do with one.",
        "Add up this rank's batches in the loop, and call comm.all_reduce once, after it.",
    ),
    moral="A loop over a rank's own data must not hold a collective, unless all have agreed how often.",
)  # fmt: skip

CYCLE = Exercise(
    name="communication.deadlock_c",
    call="pass_on(x, comm)",
    cases=_totals_cases,
    reference=lambda xs, n: [xs[rank - 1] for rank in range(n)],
    spmd=True,
    tolerance=1e-4,
    rule=_one_send,
    misconceptions=(
        Misconception("the ranks no longer talk to each other", _ALONE, lambda xs, n: xs),
        Misconception("the circle is cut open: rank 0 receives nothing",
            "It should get the last rank's x.", lambda xs, n: [xs[0], *xs[:-1]]),
        Misconception("each rank sends on what it has just received",
            "Only rank 0's x goes round then. Each should send its own.", lambda xs, n: [xs[0]] * n),
        Misconception("each rank gets the x of the rank after it",
            "The other way: send to rank + 1, receive from rank - 1.", lambda xs, n: [xs[(rank + 1) % n] for rank in range(n)]),
    ),
    hints=(
        "Who sends first?",
        "comm.send doesn't wait for its receiver; comm.recv waits for its sender. Somebody must send before receiving.",
        "Send first, then receive: the same two lines in the other order.",
    ),
    moral="A circle of receives never ends. Where sends wait too, as MPI's may, let even ranks send first, odd ones receive.",
)  # fmt: skip

EXERCISES = (RING, BYTES, SOME_RANKS, UNEVEN, CYCLE)
