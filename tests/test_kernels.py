"""The operations in C against PyTorch's, on random sizes; and a decoder with them against one without."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labkit import LLM, SamplingParams
from labkit.engine.llm import chosen_dtype
from labkit.engine.requests import CompletionOutput
from labkit.model import experts, kernels

pytestmark = pytest.mark.skipif(
    kernels.library() is None, reason="no compiled kernels: they need GCC, and a processor with AVX2 or AVX-512"
)
ROWS = st.integers(1, min(kernels.ROWS, 300))
MANY = 24  # as in kernels.c
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of a rounded result, relative to the largest one


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(mine: torch.Tensor, right: torch.Tensor) -> float:
    assert mine.shape == right.shape
    return ((mine.double() - right).abs().max() / right.abs().max().clamp(min=1)).item()


def mlp(x: torch.Tensor, inner: int, biased: bool) -> tuple[kernels.MlpStruct, torch.Tensor]:
    """An MLP as C is handed it, and what it makes of x."""
    width, dtype = x.shape[1], x.dtype
    norm, gate_up, down = (
        randn(*n, dtype=dtype, seed=s) for s, n in ((3, (width,)), (4, (2 * inner, width)), (5, (width, inner)))
    )
    bias = randn(2 * inner, dtype=dtype, seed=6) if biased else None
    struct = kernels.MlpStruct(
        dtype=kernels.DTYPES[dtype], hidden=width, inner=inner, eps=1e-5, norm=norm, gate_up=gate_up, gate_up_bias=bias,
        down=down,
    )  # fmt: skip
    normed = F.rms_norm(x.double(), (width,), norm.double(), 1e-5)
    gate, up = F.linear(normed, gate_up.double(), None if bias is None else bias.double()).chunk(2, dim=1)
    return struct, F.linear(F.silu(gate) * up, down.double())


@given(ROWS, st.integers(1, 200), st.integers(1, 100), st.booleans(), DTYPES, st.integers(1, 2))
@settings(max_examples=200, deadline=None)
@example(130, 1600, 20, True, torch.bfloat16, 2)  # in parts of its width and of its rows
@example(3, 2048, 2117, True, torch.bfloat16, 2)  # with rows of weights that get in each other's way
def test_linear(rows: int, width: int, out: int, biased: bool, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    x, w = randn(rows, width, dtype=dtype), randn(out, width, dtype=dtype, seed=1)
    bias = randn(out, dtype=dtype, seed=2) if biased else None
    right = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert distance(kernels.linear(x, w, bias), right) < BOUND[dtype]


@given(ROWS, st.integers(1, 200), st.integers(1, 100), st.booleans(), DTYPES, st.integers(1, 2))
@settings(max_examples=100, deadline=None)
@example(260, 40, 60, True, torch.bfloat16, 2)  # more than are computed at once
def test_mlp(rows: int, width: int, inner: int, biased: bool, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    x = randn(rows, width, dtype=dtype)
    struct, right = mlp(x, inner, biased)
    assert distance(kernels.mlp(kernels.library(), struct, x), right) < 4 * BOUND[dtype]


@given(ROWS, st.integers(1, 16), DTYPES)
@settings(max_examples=50, deadline=None)
def test_a_row_comes_out_the_same_whatever_is_beside_it(rows: int, fewer: int, dtype: torch.dtype) -> None:
    """Among up to MANY rows, and among more."""
    x, w = randn(rows, 147, dtype=dtype), randn(83, 147, dtype=dtype, seed=1)
    together = kernels.linear(x, w)
    if rows <= MANY:
        assert all(torch.equal(kernels.linear(x[i : i + 1].clone(), w)[0], together[i]) for i in range(rows))
    else:
        some = slice(rows - max(rows - fewer, MANY + 1), None)
        assert torch.equal(kernels.linear(x[some].clone(), w), together[some])


@given(st.integers(1, 40), st.integers(1, 100), DTYPES)
@settings(max_examples=100, deadline=None)
def test_norm_and_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, width, dtype=dtype), randn(width, dtype=dtype, seed=1)
    right = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert distance(kernels.rms_norm(x, weight, 1e-5), right) < BOUND[dtype]
    both = randn(rows, 2 * width, dtype=dtype) * 30
    gate, up = both.double().chunk(2, dim=1)
    assert distance(kernels.swiglu(both), F.silu(gate) * up) < BOUND[dtype]


@pytest.fixture(autouse=True, scope="module")
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


needs_tiles = pytest.mark.skipif(not kernels.has_tiles(), reason="the processor has no tile registers (AMX)")


@needs_tiles
@given(st.integers(1, 600), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(1, 2))
@settings(max_examples=100, deadline=None)
def test_products_by_tiles(rows: int, ins: int, outs: int, biased: bool, threads: int) -> None:
    """Sums are exact but for the order in which they are added up; of three rows or more each is the same in any company."""
    torch.set_num_threads(threads)
    bf16 = torch.bfloat16
    width, out = 32 * ins, 32 * outs
    x, w = randn(rows, width, dtype=bf16), randn(out, width, dtype=bf16, seed=1)
    bias = randn(out, dtype=bf16, seed=2) if biased else None
    right = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert distance(kernels.linear(x, w, bias), right) < BOUND[bf16]
    sums = kernels.linear(x, w, bias, wide=True)
    assert sums.dtype == torch.float32
    if rows <= kernels.TILED_ROWS:  # else it is PyTorch's, rounded
        assert distance(sums, right) < BOUND[torch.float32]

    struct, right = mlp(x, out, biased)
    c = kernels.library()
    found = kernels.mlp(c, struct, x)
    assert distance(found, right) < 4 * BOUND[bf16]  # what it multiplies is rounded twice on the way
    if rows > 10:
        assert torch.equal(kernels.mlp(c, struct, x[rows // 2 :].contiguous()), found[rows // 2 :])
        assert torch.equal(
            kernels.linear(x[:3].contiguous(), w, bias, wide=True),
            kernels.linear(x[:9].contiguous(), w, bias, wide=True)[:3],
        )


@pytest.mark.skipif(not kernels.has_tiles() and kernels.ROWS < 300, reason="attention of prompts is PyTorch's here")
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.sampled_from([32, 64, 96, 128]), st.integers(1, 90),
    st.integers(0, 90), st.sampled_from([16, 48]), st.integers(1, 2),
)  # fmt: skip
@example(2, 2, 0, 32, 90, 1000, 16, 2)  # in parts of its context
@settings(max_examples=100, deadline=None)
def test_attention_of_a_piece_of_a_prompt(
    kv_heads: int, group: int, skipped: int, width: int, rows: int, start: int, size: int, threads: int
) -> None:
    """Heads of one rank, which may have the first group only in part; its last one it always has in part where it can."""
    skipped = min(skipped, group - 1)
    heads = max(kv_heads * group - skipped - (kv_heads > 1 and group > 1), 1)
    blocks, context = -(-(start + rows) // size), start + rows
    table = torch.randperm(blocks + 2, generator=torch.Generator().manual_seed(1))[:blocks]
    k, v = (randn(blocks + 2, size, kv_heads, width, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    for cache in (k, v):  # behind the last token, and in blocks of others, there may be anything
        cache[[b for b in range(blocks + 2) if b not in table]] = torch.nan
        cache[table[-1], context - (blocks - 1) * size :] = torch.nan
    qkv = randn(rows + 3, heads + 2 * kv_heads, width, dtype=torch.bfloat16, seed=4)
    struct = kernels.AttentionStruct(
        dtype=1, hidden=0, heads=heads, kv_heads=kv_heads, width=width, group=group, skipped=skipped, eps=0
    )
    step = kernels.StepStruct(rows=rows + 3, threads=threads, size=size, blocks=0)

    def mine(at: int, count: int) -> torch.Tensor:
        piece = slice(3 + at, 3 + at + count)
        return kernels.piece(kernels.library(), struct, step, piece, start + at, table, qkv, k, v)

    whole = mine(0, rows)
    keys, values = (
        cache[table].flatten(0, 1)[:context, [(h + skipped) // group for h in range(heads)]].double().transpose(0, 1)
        for cache in (k, v)
    )
    mask = torch.ones(rows, context, dtype=torch.bool).tril(start)
    q = qkv[3:, :heads].double().transpose(0, 1)
    right = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(0, 1).flatten(1)
    assert distance(whole, right) < 2 * BOUND[torch.bfloat16]
    cut = rows // 3
    if cut:  # to the bit, wherever a prompt is cut
        assert torch.equal(torch.cat((mine(0, cut), mine(cut, rows - cut))), whole)


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor has no instructions for 16 bits."""
    monkeypatch.setattr(kernels, "is_slow", lambda dtype: dtype != torch.float32)


def test_without_bfloat16_or_c_rows_are_multiplied_in_float32(
    no_bfloat16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    x, w, bias = (randn(*shape, dtype=torch.bfloat16, seed=n) for n, shape in enumerate(((99, 144), (80, 144), (80,))))
    right = F.linear(x.double(), w.double(), bias.double())
    wide, narrow = kernels.linear(x, w, bias, wide=True), kernels.linear(x, w, bias)
    assert wide.dtype == torch.float32 and distance(wide, right) < BOUND[torch.float32]
    assert narrow.dtype == torch.bfloat16 and distance(narrow, right) < BOUND[torch.bfloat16]
    counts = (70, 0, 29)
    each = [F.linear(part.double(), w.double()) for part in x.split(counts)]
    assert distance(experts._grouped(x, w.expand(3, *w.shape), counts), torch.cat(each)) < BOUND[torch.bfloat16]


def test_auto_is_the_format_that_is_fast(no_bfloat16: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [chosen_dtype("auto", name) for name in ("bfloat16", "float16")] == ["bfloat16", "float32"]
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert [chosen_dtype(name, "bfloat16") for name in ("auto", "bfloat16")] == ["float32", "bfloat16"]


def test_fake_tensors_and_formats_it_does_not_know_are_left_to_pytorch() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert kernels.suiting(torch.ones(2, 3)) is not None
    assert kernels.suiting(torch.ones(2, 3, dtype=torch.float16)) is None
    assert kernels.suiting(torch.ones(0, 3)) is None
    assert kernels.suiting(torch.ones(2, 3).T) is None
    assert kernels.suiting(torch.ones(9, 3), rows=8) is None
    with FakeTensorMode():
        assert kernels.suiting(torch.ones(2, 3)) is None


@pytest.mark.parametrize("degrees", [{}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}], ids=str)
def test_a_decoder_says_the_same_with_and_without(degrees: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 in float32: prompts of several lengths, cut into pieces, alone and together; heads split unevenly."""
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2)
    found: dict[str, list[CompletionOutput]] = {"c": [], "torch": []}
    for kind, outputs in found.items():
        monkeypatch.setitem(os.environ, "LABKIT_KERNELS", kind)
        with LLM(dtype="float32", max_model_len=512, max_num_batched_tokens=100, **degrees) as llm:
            for batch in (1, 3, 12):
                prompts = [[7 * i + 11 * j + 5 for j in range(1 + 19 * i)] for i in range(batch)]
                outputs += [output.outputs[0] for output in llm.generate(prompts, params)]
    for mine, theirs in zip(found["c"], found["torch"], strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs and theirs.logprobs
        pairs = zip(mine.logprobs, theirs.logprobs, strict=True)
        assert max(abs(a[i] - b[i]) for a, b in pairs for i in a) < 1e-3
    assert found["c"] != found["torch"]  # to the last bit, they'd be equal only if C had not been used
