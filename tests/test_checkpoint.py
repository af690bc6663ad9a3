"""Reading weights by slices, random weights, and what is refused: by name, before any rank starts."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from labkit import LLM
from labkit.model.checkpoint import Checkpoint, Piece, RandomWeights
from labkit.model.errors import ModelError
from labkit.model.find import find
from labkit.split import LayoutError

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write("llama", tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("dim", "part"), [(0, range(3, 40)), (1, range(13)), (0, range(70))])
def test_a_slice_is_that_part_of_the_tensor_and_only_its_bytes_are_read(folder: Path, dim: int, part: range) -> None:
    whole = load_file(folder / "model.safetensors")[UP]
    checkpoint = Checkpoint(folder)
    got = checkpoint.read(Piece(UP, tuple(whole.shape), dim, part))
    assert torch.equal(got, whole.narrow(dim, part.start, len(part)))
    assert checkpoint.bytes_read == got.numel() * 4


@pytest.mark.parametrize("dim", [0, 1])
def test_a_random_shard_is_that_part_of_the_whole(dim: int) -> None:
    shape = (200, 130)
    whole = RandomWeights(seed=3).read(Piece("w", shape, dim, range(shape[dim])))
    part = RandomWeights(seed=3).read(Piece("w", shape, dim, range(50, 129)))
    assert torch.equal(part, whole.narrow(dim, 50, 79))
    assert whole.std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(whole, RandomWeights(seed=4).read(Piece("w", shape, dim, range(shape[dim]))))


def test_random_shapes_serve_token_ids_alike_in_every_layout() -> None:
    seen = []
    for degrees in ({}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        with LLM("random:smollm2-135m", dtype="float32", max_model_len=64, max_num_seqs=2, **degrees) as llm:
            seen.append(llm.generate([[5, 6, 7], [8]])[0].outputs[0].token_ids)
            assert all(r["bytes_read"] == 0 for r in llm.report()["ranks"])
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "needs factor, low_freq_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000 can't be meant"),
        ({"hidden_size": 48.0}, "hidden_size=48.0"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 can't be meant: 1000 is the most"),
        ({"num_hidden_layers": 5}, "has no tensor model.layers.4"),
        ({"head_dim": 7}, "head_dim=7; an even number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small'; a number above 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05; a number above 0"),
        ({"eos_token_id": "x"}, "eos_token_id='x'; a token id"),
        ({"eos_token_id": [None]}, "eos_token_id=\\[None\\]; a token id"),
        ({"rope_parameters": "x"}, "rope parameters 'x'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta=nan; a number above 0"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor=0; a number above 0"),
        ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window='x'"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": "all"}, "mlp_only_layers='all'"),
    ],
)
def test_a_config_that_is_not_supported_is_named(folder: Path, changes: dict, said: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=said):
        LLM(str(folder))


def test_layouts_that_do_not_fit_are_refused_before_ranks_start(folder: Path) -> None:
    with pytest.raises(LayoutError, match="6 query heads .* use 1 to 6"):
        LLM(str(folder), tensor_parallel_size=7)
    with pytest.raises(LayoutError, match="4 layers: use 1 to 4"):
        LLM(str(folder), pipeline_parallel_size=5)
    with pytest.raises(ModelError, match="has no experts"):
        LLM(str(folder), enable_expert_parallel=True)


def test_a_context_beyond_the_sliding_window_is_refused(tmp_path: Path) -> None:
    tiny.write("mistral", tmp_path)
    edit_config(tmp_path, sliding_window=32)
    with pytest.raises(ModelError, match="use at most the window, 32"):
        LLM(str(tmp_path), max_model_len=64)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[UP]
    save_file(tensors, folder / "model.safetensors")


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "../model.safetensors"}}))


def index_missing_file(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "other.safetensors"}}))


def index_of(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_bytes(content)


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def offsets(begin: int, end: int) -> Callable[[Path], object]:
    """A header whose first tensor lies elsewhere."""

    def damage(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header[UP]["data_offsets"] = [begin, end]
        raw = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return damage


def wrong_dtype(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, UP: tensors[UP].to(torch.int32)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "is damaged or is not a safetensors file"),
        (drop_tensor, f"has no tensor {UP}"),
        (index_outside, "not a plain file name"),
        (index_missing_file, "other.safetensors, which is missing"),
        (index_of(b"[" * 100_000), "is not an index of safetensors files"),
        (index_of(b"\xff\xfe"), "is not an index of safetensors files"),
        (index_of(b'{"weight_map": [1]}'), "is not an index of safetensors files"),
        (index_of(json.dumps({"weight_map": {UP: "/etc/passwd"}}).encode()), "not a plain file name"),
        (index_of(json.dumps({"weight_map": {UP: "."}}).encode()), "not a plain file name"),
        (index_of(json.dumps({"weight_map": {UP: "config.json"}}).encode()), "has no tensor|is damaged or is not"),
        (only_pickled, "pytorch_model.bin is pickled, which can run any code when it is loaded, and is not read"),
        (offsets(10**9, 10**9 + 70 * 48 * 4), "is damaged or is not a safetensors file"),
        (offsets(-8, 70 * 48 * 4 - 8), "is damaged or is not a safetensors file"),
        (offsets(0, 70 * 48 * 4), "is damaged or is not a safetensors file"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not JSON"),
        (wrong_dtype, "is I32; supported are F32, F16, BF16"),
        (
            lambda folder: edit_config(folder, intermediate_size=71),
            r"has shape \(70, 48\); config.json calls for \(71, 48\)",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "does not exist"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither"),
    ],
)
def test_damaged_folders_end_in_a_model_error(folder: Path, damage: object, said: str) -> None:
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ModelError, match=said):  # which is no RankError: it is known before ranks start
        LLM(str(folder))


@pytest.mark.parametrize("name", ["no-such-model", "random:no-such-shape", "/no/such/folder"])
def test_an_unknown_model_says_what_there_is(name: str) -> None:
    with pytest.raises(ModelError, match=r"smollm2-135m|known are"):
        find(name)


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "tokenizer_theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Theirs: pass\n")
    auto_map = {"auto_map": {"AutoTokenizer": ["tokenizer_theirs.Theirs", None]}, "tokenizer_class": "Theirs"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto_map))
    edit_config(folder, auto_map={"AutoConfig": "tokenizer_theirs.Theirs"})
    with LLM(str(folder), max_model_len=64) as llm, pytest.raises(ModelError, match="its tokenizer can't be loaded"):
        llm.generate("text")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["smollm2-135m", "tiny-moe"])
def test_text_becomes_the_ids_that_transformers_makes_of_it(name: str) -> None:
    folder = find(name).folder
    theirs = AutoTokenizer.from_pretrained(folder)
    with LLM(name, max_model_len=64) as llm:
        ours = llm.tokenizer
    for text in ("The tide comes", "  two spaces, a\ttab\n", "<|im_start|>user\n\u6f6e 12345 \U0001f30a", ""):
        ids = theirs(text).input_ids
        assert ours(text).input_ids == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.chat_template == theirs.chat_template and ours.eos_token_id == theirs.eos_token_id
