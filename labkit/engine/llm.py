"""`LLM`: text in, text out, over any layout, with vLLM's names.

In a script or notebook it starts local ranks and sends them one message per `generate`; under torchrun it finds itself on a
rank and runs in place, on every rank alike. It turns text into ids and back, and knows nothing of how ranks share the work.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm

from labkit.comm import Comm, Event
from labkit.engine.core import DTYPES, Engine, EngineOptions, Inbox
from labkit.engine.outputs import TextStream, request_output
from labkit.engine.report import assemble
from labkit.engine.requests import InFlight, Progress, Request, RequestOutput, SamplingParams, Token
from labkit.launch.local import RankError, RankGroup, in_torchrun, join_torchrun, launchers, threads_per_rank
from labkit.links import Link, measured_gbit
from labkit.mesh import Layout
from labkit.model import kernels
from labkit.model.checkpoint import Checkpoint
from labkit.model.decoder import check_layout, tensors
from labkit.model.errors import ModelError
from labkit.model.find import DEFAULT, Model, find
from labkit.parallel.expert import EXCHANGES, Spread
from labkit.parallel.overlap import MODES

MEASURE_THE_LINK = "measure the link"  # messages to the ranks
LIVE = "live"  # from now on, requests come one by one
HELD = 0.25  # seconds for which a rank may keep what nobody waits for: each message takes a core from the ranks, for 0.4 ms
HANG = 10.0  # seconds that a rank may neither wait for another nor compute
Prompt = str | list[int] | dict[str, list[int]]


class LLM:
    """A model served by tensor_parallel_size x pipeline_parallel_size x data_parallel_size ranks.

    Args:
        model: "smollm2-135m", "tiny-moe", a Hugging Face folder, a GGUF file, "random:NAME" (seeded random weights of a
            known shape or a config.json), or a Hub id.
        tensor_parallel_size, pipeline_parallel_size, data_parallel_size: degrees; each replica is tp x pp ranks.
        enable_expert_parallel: spread the experts of a mixture-of-experts model over the dp x tp ranks of each stage; off, each
            expert is cut over tp.
        rank_order: which ranks are neighbours, and so on one host: tensor-parallel ones ("dp-pp-tp"), or by another order of
            the three, as "dp-tp-pp", stages.
        expert_exchange: how tokens and experts meet then: "all_to_all", "all_gather" or "all_reduce" (`labkit.parallel.expert`).
        expert_placement: which rank has which expert: "contiguous", "round-robin", or by layer the experts of each rank, as
            `labkit.split.experts_by_load` makes them from the loads in a report.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's, but float32 for 16-bit checkpoints on a CPU
            without 16-bit instructions, where it is faster: unless they are bfloat16 and the C kernels were built.
        max_model_len: longest prompt plus output, in tokens; the KV cache is made for it.
        max_num_seqs: sequences in flight at once, on each replica.
        max_num_batched_tokens: tokens in one step; longer prompts are computed in pieces.
        kv_cache_tokens: room in the KV cache, on each replica (default: for max_num_seqs of the longest sequences). With less,
            requests wait, or give up their room and are computed again.
        seed: of random weights, and of the noise of requests that bring no seed.
        threads: torch threads of each rank; by default the cores shared out evenly.
        collective_timeout: seconds that a rank waits for another before the run is given up.
        shared_memory: ranks of one host talk through shared memory where they can; off, through sockets alone.
        distributed_executor_backend: "mp", ranks on this machine, or "ray", on the nodes of a Ray cluster (`labkit.launch.ray`).
        link: between the ranks, as "1gbit" or "200mbit,50us" (`labkit.links`); its measured rate is in the report.
        overlap: "none"; "chunks" (pieces of each prompt) or "two-batch" (two halves of the sequences) hide communication over
            a slow link behind computation (`labkit.parallel.overlap`).
        enable_prefix_caching: keep K and V of what has been computed while there is room, so that a request which begins with
            the same tokens (a conversation so far, a system prompt, the prompt of n outputs) computes only the rest. Each replica
            keeps its own. Off, unlike vLLM's, so that the same prompt can be measured twice.
        enforce_eager: on GPUs, launch every kernel of a decode step by itself instead of repeating a CUDA graph.
        trace: keep what each rank did when, for `trace()`.
        debug: compare each step's plan over the ranks, and name the rank and step that differ (slow).
        restart: when a rank fails, start all ranks again, and go on with each request behind the last token that it has got. What
            it gets is the same (but where numbers are so close that computing several tokens together tips them).

    Raises ModelError for a model that is not supported or whose files are not whole, LayoutError for degrees that do not fit,
    before any rank starts; RankError when a rank fails, with restart=True at the fourth time that no request could be finished
    in between. After a RankError the next call starts fresh ranks.
    """

    def __init__(
        self,
        model: str = DEFAULT,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
        rank_order: str = "dp-pp-tp",
        expert_exchange: str = "all_to_all",
        expert_placement: str | Mapping[int, Sequence[Sequence[int]]] = "contiguous",
        dtype: str = "auto",
        max_model_len: int = 2048,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 4096,
        kv_cache_tokens: int | None = None,
        seed: int = 0,
        threads: int | None = None,
        collective_timeout: float = 60.0,
        shared_memory: bool = True,
        distributed_executor_backend: str = "mp",
        link: Link | str | None = None,
        overlap: str = "none",
        enable_prefix_caching: bool = False,
        enforce_eager: bool = False,
        trace: bool = False,
        debug: bool = False,
        restart: bool = False,
    ) -> None:
        self.layout = Layout(
            tp=tensor_parallel_size, pp=pipeline_parallel_size, dp=data_parallel_size,
            expert_parallel=enable_expert_parallel, order=rank_order,
        )  # fmt: skip
        self.model: Model = find(model)
        config = self.model.config
        spread = Spread(_one_of("expert_exchange", expert_exchange, EXCHANGES), expert_placement)
        if enable_expert_parallel and not config.moe:
            raise ModelError(f"enable_expert_parallel=True: {model} has no experts to spread")
        check_layout(config, self.layout, spread)
        if overlap != "none" and self.layout.ep > self.layout.tp:
            raise ValueError(
                f"overlap={overlap!r} with data- and expert-parallel ranks is not supported: replicas that step together "
                "can't cut their steps alike"
            )
        self.options = EngineOptions(
            dtype=chosen_dtype(dtype, config.dtype),
            max_model_len=_at_least_one("max_model_len", min(max_model_len, config.max_positions)),
            max_num_seqs=_at_least_one("max_num_seqs", max_num_seqs),
            max_num_batched_tokens=_at_least_one("max_num_batched_tokens", max_num_batched_tokens),
            seed=seed,
            kv_cache_tokens=None if kv_cache_tokens is None else _at_least_one("kv_cache_tokens", kv_cache_tokens),
            overlap=_one_of("overlap", overlap, MODES),
            spread=spread,
            prefix_caching=enable_prefix_caching,
            enforce_eager=enforce_eager,
            trace=trace,
            debug=debug,
        )
        if config.sliding_window and self.options.max_model_len > config.sliding_window:
            raise ModelError(
                f"max_model_len={self.options.max_model_len}: sliding-window attention is not supported; "
                f"use at most the window, {config.sliding_window}"
            )
        if self.model.folder:
            with closing(Checkpoint(self.model.folder)) as checkpoint:
                checkpoint.check(tensors(config))
        self._executor = _one_of("distributed_executor_backend", distributed_executor_backend, ("mp", "ray"))
        self.threads = threads or (1 if self._executor == "ray" else threads_per_rank(self.layout.world))
        self._between: dict[str, Any] = {
            "collective_timeout": collective_timeout,
            "shared_memory": shared_memory,
            "overlap": overlap != "none",
        }
        link = Link.parse(link) if isinstance(link, str) else link
        self._group: RankGroup | None = None
        self._idle = True  # the ranks have said all that they were asked
        self._engine: Engine | None = None
        self._tokens: list[list[Token]] = []
        self._rank_reports: list[dict[str, Any]] = []
        self._link: dict[str, Any] | None = None
        self.restart, self.restarts = restart, 0
        if in_torchrun():
            if link:
                raise ValueError(f"link={str(link)!r} under torchrun: links are emulated between local CPU ranks only")
            if restart:
                raise ValueError("restart=True under torchrun: ranks that it has started, it restarts (--max-restarts)")
            if self._executor == "ray":
                raise ValueError(
                    "distributed_executor_backend='ray' under torchrun, which has started the ranks: use 'mp'"
                )
            comm = join_torchrun(self.layout, threads=threads, **self._between)
            self.threads = torch.get_num_threads()
            self._engine = _load(self.model, comm, self.options)
        else:
            self._between["link"] = link
            self._start()

    # -- generating ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Serves all prompts together; outputs in the prompts' order. One SamplingParams for all, or one for each.

        use_tqdm: show a progress bar, where it takes longer than two seconds.
        """
        single = isinstance(prompts, str | bytes | dict) or not isinstance(prompts, Iterable) or _is_ids(prompts)
        many: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        requests = self.requests(many, sampling_params)
        tokens: dict[int, list[Token]] = {request.index: [] for samples in requests for request in samples}
        tokenizer = self.tokenizer if self.model.folder else None

        def outputs() -> list[RequestOutput]:
            return [
                request_output(str(i), prompt, [(request, tokens[request.index]) for request in samples], tokenizer)
                for i, (prompt, samples) in enumerate(zip(many, requests, strict=True))
            ]

        try:
            with _bar(len(tokens), use_tqdm and self.leads) as bar:
                for step in self._run([request for samples in requests for request in samples]):
                    for token in step:
                        tokens[token.request].append(token)
                        bar.update(token.finish_reason is not None)
        except RankError as error:
            error.outputs = outputs()
            raise
        return outputs()

    def chat(
        self, messages: list[dict[str, str]], sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """One answer to a conversation [{"role": ..., "content": ...}, ...], through the model's own chat template."""
        return self.generate(self.chat_prompt(messages), sampling_params)

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids that the model's chat template makes of a conversation."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, AttributeError) as error:
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from error
        return self._tokenized(text, add_special_tokens=False)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The output of one prompt, piece by piece as it is generated. Left before its end, the ranks have to start anew."""
        [[request, *more]] = self.requests([prompt], sampling_params)
        if more:
            raise ValueError(f"n={request.params.n}: stream gives one output")
        text = TextStream(request, self.tokenizer)
        for step in self._run([request], at_once=True):
            if piece := "".join(text.add(token) for token in step):
                yield piece

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer (transformers)."""
        if self.model.folder is None:
            raise ModelError(f"{self.model.name} has no tokenizer: prompts must be token ids, and so are the outputs")
        import transformers

        # Where tokenizer.json says all, AutoTokenizer would look through every architecture for the same, 3 seconds longer.
        name = "PreTrainedTokenizerFast" if (self.model.folder / "tokenizer.json").exists() else "AutoTokenizer"
        kind = getattr(transformers, name)
        try:
            # Code that comes with a model is never run.
            return kind.from_pretrained(self.model.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{self.model.folder}: its tokenizer can't be loaded: {error}") from error

    @property
    def leads(self) -> bool:
        """True where outputs should be shown: everywhere but on ranks 1, 2, ... of a torchrun."""
        return self._engine is None or self._engine.comm.rank == 0

    # -- what was measured ---------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Measured in the last `generate`: speed, bytes and calls of communication, memory of each rank.

        Fields: `labkit.engine.report.assemble`. Before the first `generate`, only what each rank holds.
        """
        report = assemble(self.layout, self.options, self.threads, self._rank_reports, self._tokens)
        return report | {"link": self._link, "restarts": self.restarts}

    def trace(self) -> list[list[Event]]:
        """What each rank did in the last `generate`, in rank order (`labkit.measure.trace`). Needs LLM(trace=True)."""
        if not self.options.trace:
            raise ValueError("nothing was traced: make it with LLM(..., trace=True)")
        return [rank["events"] for rank in self._rank_reports]

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the ranks. The next call to `generate` would start new ones."""
        if self._group:
            self._group.close()
            self._group = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ranks(self) -> RankGroup:
        """The running ranks; starts them where there are none."""
        if self._engine:
            raise ValueError("under torchrun ranks run in place: there is nobody to send them messages")
        if not self._idle:  # an interrupt came before they could be closed, or a stream was left open
            self.close()
        return self._group or self._start()

    def take_reports(self, message: dict[str, Any]) -> None:
        """What the ranks say of a run at its end."""
        self._rank_reports = message["ranks"]

    def _start(self) -> RankGroup:
        group = launchers("local" if self._executor == "mp" else "ray")(
            _serve,
            self.layout.world,
            args=(self.model, self.options, self._between["link"] is not None),
            layout=self.layout,
            threads=self.threads,
            hang_timeout=HANG,
            **self._between,
        )
        ready = dict(group.receive() for _ in range(self.layout.world))
        self._rank_reports = [ready[rank] for rank in sorted(ready)]
        if link := self._between["link"]:
            rate = None
            if self.layout.world > 1:
                group.send(MEASURE_THE_LINK)
                rate = group.receive()[1]
            self._link = {"label": group.link_label, "asked_gbit_per_s": link.gbit_per_s, "measured_gbit_per_s": rate}
        self._group, self._idle = group, True
        return group

    def _run(self, requests: list[Request], at_once: bool = False) -> Iterator[list[Token]]:
        """Serves the requests; yields each step's tokens, and keeps what `report` needs. at_once: somebody waits for each."""
        self._tokens = []
        engine = self._engine
        for step in self._run_in_place(engine, requests) if engine else self._run_on_ranks(requests, at_once):
            self._tokens.append(step.tokens)
            yield step.tokens

    def _run_on_ranks(self, requests: list[Request], at_once: bool) -> Iterator[Progress]:
        in_flight, began, self.restarts = InFlight(self.restart), time.perf_counter(), 0
        in_flight.add(requests)
        while True:
            try:
                for step in self._run_once(in_flight.left(), at_once, began if self.restarts else None):
                    in_flight.take(step.tokens)
                    yield step
                return
            except RankError:
                if not in_flight.again():
                    raise
                self.restarts += 1

    def _run_once(self, requests: list[Request], at_once: bool, began: float | None) -> Iterator[Progress]:
        """`began`: of ranks that go on where others have failed, when those began; times count from there."""
        group, self._idle = self.ranks(), False
        earlier = time.perf_counter() - began if began else 0.0
        try:
            # A rank that has been stopped takes no message that is longer than a pipe. That it has shows below.
            threading.Thread(target=group.send, args=((requests, at_once),), daemon=True).start()
            replicas = self.layout.dp
            while replicas:
                _, message = group.receive()
                if isinstance(message, dict):
                    replicas -= 1
                    self.take_reports(message)
                    continue
                for step in message:
                    if began:
                        step = replace(step, tokens=[replace(t, seconds=t.seconds + earlier) for t in step.tokens])
                    yield step
            for rank in self._rank_reports:
                rank["seconds"] += earlier
            self._idle = True
        finally:
            if not self._idle:  # a rank failed, or the caller stopped half-way: what the ranks do now is of no use
                self.close()

    def _run_in_place(self, engine: Engine, requests: list[Request]) -> Iterator[Progress]:
        if self.layout.dp == 1:
            yield from engine.generate(requests)
        else:  # replicas differ in what they serve: put it together at the end
            steps = list(engine.generate(requests))
            everyones = engine.comm.gather_objects(steps)
            replicas = [everyones[rank] for rank in self.layout.peers(0, "dp")]
            yield from sorted((s for replica in replicas for s in replica), key=lambda s: s.tokens[0].seconds)
        self._rank_reports = engine.comm.gather_objects(engine.report())

    # -- text ----------------------------------------------------------------------------------------------------------

    def requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, first: int = 0
    ) -> list[list[Request]]:
        """For each prompt as many requests as outputs are wanted, numbered from `first` on.

        Checks everything that can be known before the ranks see it.
        """
        if not prompts:
            raise ValueError("no prompts: give at least one")
        each = (
            [params or SamplingParams()] * len(prompts)
            if params is None or isinstance(params, SamplingParams)
            else params
        )
        if not isinstance(each, Sequence) or not all(isinstance(p, SamplingParams) for p in each):
            raise TypeError(f"sampling_params={each!r:.50}: give a SamplingParams, or a list of one for each prompt")
        if len(each) != len(prompts):
            raise ValueError(
                f"{len(each)} sampling_params for {len(prompts)} prompts: give one, or one for each prompt"
            )
        numbers = [*accumulate((p.n for p in each), initial=first)]
        return [
            [self._request(i, numbers[i] + j, j, ids, p) for j in range(p.n)]
            for i, (ids, p) in enumerate(zip(map(self._ids, prompts), each, strict=True))
        ]

    def _request(self, prompt: int, index: int, sample: int, ids: list[int], params: SamplingParams) -> Request:
        room = self.options.max_model_len - len(ids)
        vocab = self.model.config.vocab
        if not ids:
            raise ValueError(f"prompt {prompt} is empty: at least one token is needed")
        if room < 1:
            raise ValueError(
                f"prompt {prompt} has {len(ids)} tokens; max_model_len={self.options.max_model_len} leaves no room"
            )
        if not all(0 <= i < vocab for i in ids):
            raise ValueError(f"prompt {prompt} has token ids outside 0 to {vocab - 1}")
        if params.stops and not self.model.folder:
            raise ModelError(f"{self.model.name} has no tokenizer: stop={params.stop!r} can't be found in its output")
        if params.logprobs is not None and params.logprobs > vocab:
            raise ValueError(f"logprobs={params.logprobs}: use at most {vocab}, the size of the vocabulary")
        ends = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else set(self.model.config.eos_ids))
        seed = self.options.seed * 1_000_003 + index if params.seed is None else int(params.seed) + sample
        return Request(index, ids, params, seed, frozenset(ends), min(params.max_tokens, room))

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenized(prompt)
        if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
            prompt = prompt["prompt_token_ids"]
        if not isinstance(prompt, list | tuple) or not all(isinstance(i, Integral) for i in prompt):
            odd = next((i for i in prompt if not isinstance(i, Integral)), None) if isinstance(prompt, list) else None
            got = type(prompt).__name__ + (f" with {odd!r:.50} in it" if odd is not None else "")
            raise TypeError(f"a prompt is a string, a list of token ids, or {{'prompt_token_ids': [...]}}; got {got}")
        return [int(i) for i in prompt]

    def _tokenized(self, text: str, **options: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a prompt holds {text[error.start]!r}, half a character, at position {error.start}"
            ) from None
        ids: list[int] = self.tokenizer(text, **options).input_ids
        return ids


def _load(model: Model, comm: Comm, options: EngineOptions, asked_for: bool = False) -> Engine:
    """asked_for: several hosts are emulated between local ranks, to be measured as they are."""
    engine = Engine(model, comm, options)
    if not (asked_for or comm.mesh.on_one_host("world")):
        from labkit.predict.placement import warn_of_parted_groups

        warn_of_parted_groups(engine)
    return engine


def _serve(comm: Comm, channel: Any, model: Model, options: EngineOptions, emulated: bool) -> None:
    """What each launched rank does: load, then serve one message of requests after another until the channel closes."""
    engine = _load(model, comm, options, emulated)
    channel.send(engine.report())
    leads = comm.mesh.pp_rank == comm.mesh.tp_rank == 0
    while True:
        try:
            message = channel.receive()
        except EOFError:
            return
        if message == MEASURE_THE_LINK:
            rate = measured_gbit(comm, megabytes=4, repeats=2)
            if comm.rank == 0:
                channel.send(rate)
            continue
        requests, at_once = ([], True) if message == LIVE else message
        held: list[Progress] = []
        sent, begun = 0.0, set[int]()
        for step in engine.generate(requests, Inbox(channel, engine) if message == LIVE else None):
            if not leads:
                continue
            held.append(step)
            # A request's first token is told at once too.
            first = set() if at_once else {token.request for token in step.tokens} - begun
            if at_once or first or time.perf_counter() - sent > HELD:
                channel.send(held)
                held, sent = [], time.perf_counter()
                begun |= first
        reports = comm.gather_objects(engine.report())
        if leads:
            channel.send(held)
            channel.send({"ranks": reports})


def _bar(total: int, shown: bool) -> tqdm:
    """A progress bar; where the output is not a terminal's (papermill, a log file) one that says little."""
    return tqdm(
        total=total,
        desc="requests",
        unit="",
        disable=not shown,
        delay=2,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(i, Integral) for i in prompt)


def chosen_dtype(asked: str, checkpoint: str) -> str:
    """What `dtype` means for a checkpoint on this machine. Raises ValueError."""
    name = checkpoint if asked == "auto" else asked
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is not supported: use 'auto', {', '.join(map(repr, DTYPES))}")
    if asked == "auto" and not torch.cuda.is_available() and kernels.is_slow(DTYPES[name]):
        in_c = DTYPES[name] in kernels.DTYPES and kernels.library() is not None  # reads half as much for a token
        return name if in_c else "float32"
    return name


def _one_of(name: str, value: str, legal: Sequence[str]) -> str:
    if value not in legal:
        raise ValueError(f"{name}={value!r}: use {', '.join(map(repr, legal))}")
    return value


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}={value}: use 1 or more")
    return value
