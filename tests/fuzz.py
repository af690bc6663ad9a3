"""`make fuzz`: coverage-guided fuzzing of everything that reads a model's files: config.json, safetensors, its index, GGUF.

Whatever a file holds, reading it ends as a model or as a ModelError, soon and in bounded memory. Anything else stops the run,
and the bytes that did it are in build/fuzz/found. Seconds: FUZZ_SECONDS.
"""

import json
import os
import shutil
import sys
from contextlib import closing
from functools import cache
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["labkit.model", "safetensors", "json"]):
    import tiny
    from test_gguf_import import tiny as tiny_gguf

    from labkit.model.checkpoint import Checkpoint, Piece
    from labkit.model.config import ModelConfig
    from labkit.model.decoder import tensors
    from labkit.model.errors import ModelError
    from labkit.model.gguf_import import import_gguf

FOLDER = Path("build/fuzz")
WHOLE = FOLDER / "whole"
FILES = {  # of each kind, by the first byte of an input: where the rest of it goes
    b"c": FOLDER / "config" / "config.json",
    b"s": FOLDER / "single" / "model.safetensors",
    b"i": FOLDER / "index" / "model.safetensors.index.json",  # beside a whole model.safetensors
    b"g": FOLDER / "gguf" / "model.gguf",
}


def one_input(data: bytes) -> None:
    file = FILES.get(data[:1])
    if not file:
        return
    file.write_bytes(data[1:])
    try:
        if file.name == "config.json":
            ModelConfig.read(file)
        elif file.name == "model.gguf":
            shutil.rmtree(FOLDER / "cache", ignore_errors=True)
            import_gguf(file, FOLDER / "cache")
        else:
            with closing(Checkpoint(file.parent)) as checkpoint:
                checkpoint.check(pieces())
                for piece in pieces():
                    checkpoint.read(piece)
    except ModelError:
        pass


@cache
def pieces() -> list[Piece]:
    return tensors(ModelConfig.read(WHOLE))


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    corpus, found = FOLDER / "corpus", FOLDER / "found"
    for folder in (corpus, found, *(file.parent for file in FILES.values())):
        folder.mkdir(parents=True)
    tiny.write("llama", WHOLE)
    shutil.copy(WHOLE / "model.safetensors", FILES[b"i"].parent)
    index = {"weight_map": dict.fromkeys([piece.name for piece in pieces()], "model.safetensors")}
    seeds = {
        "c": (WHOLE / "config.json").read_bytes(),
        "s": (WHOLE / "model.safetensors").read_bytes(),
        "i": json.dumps(index).encode(),
        "g": tiny_gguf(FOLDER / "seed.gguf").read_bytes(),
    }
    for kind, content in seeds.items():
        (corpus / kind).write_bytes(kind.encode() + content)
    options = [
        f"-max_total_time={os.environ.get('FUZZ_SECONDS', '600')}", "-timeout=10", "-rss_limit_mb=3000",
        f"-max_len={2 * max(map(len, seeds.values()))}", f"-artifact_prefix={found}/", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
