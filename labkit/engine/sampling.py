"""Choosing the next token from logits that are spread over the ranks of a replica by vocabulary.

Sampling is an argmax: adding Gumbel noise to logits / temperature and taking the largest is a draw from their softmax
(the Gumbel-max trick). A token's noise is a hash of (seed, position, its id), so the drawn token depends on neither layout
nor batch, and a rank makes noise only for tokens that it chooses from. The hash: an odd multiple of the id, plus a number, both
from (seed, position), through the mixer that Chris Wellons searched for the least bias
(https://nullprogram.com/blog/2018/07/31/).
"""

import hashlib
import struct
from collections.abc import Sequence

import torch

from labkit.engine.requests import Request, SamplingParams
from labkit.model import kernels
from labkit.parallel.tensor import VocabParallelHead

FEW = 1024  # of the vocabulary: more tokens than top_p or min_p usually leave
IN_CACHE = 2**16  # numbers that are worked on at once on a CPU


def sample(logits: torch.Tensor, requests: Sequence[Request], head: VocabParallelHead) -> torch.Tensor:
    """Ids (B,) for logits (B, this rank's part of the vocabulary) in float32, the same on every rank.

    Overwrites the logits where requests ask for more than the largest.

    If any request wants log probabilities, float64 rows (B, 2 + 2k) instead: id, its log probability, the k likeliest ids,
    theirs; of the model's own distribution, before temperature and penalties, as in vLLM.
    """
    params = [request.params for request in requests]
    wanted = max((p.logprobs for p in params if p.logprobs is not None), default=None)
    logprobs = head.gather(logits).log_softmax(-1) if wanted is not None else None
    if any(p.penalises for p in params):
        for row, request in zip(logits, requests, strict=True):
            _penalise(row, request, head.rows)
    ids = head.argmax(logits) if all(p.greedy for p in params) else _draw(logits, requests, head)
    if wanted is None or logprobs is None:
        return ids
    top = logprobs.topk(wanted)
    own = logprobs.gather(1, ids.unsqueeze(1))
    return torch.cat([part.double() for part in (ids.unsqueeze(1), own, top.indices, top.values)], dim=1)


def _draw(scores: torch.Tensor, requests: Sequence[Request], head: VocabParallelHead) -> torch.Tensor:
    """Ids (B,). Which tokens are in the top p or k is a question about whole rows; where nobody asks it, parts will do."""
    asking = [r.params.restricts and not r.params.greedy for r in requests]
    ids = torch.empty(len(requests), dtype=torch.int64, device=scores.device)
    for restricted in sorted({*asking}):
        rows = [i for i, asks in enumerate(asking) if asks == restricted]
        some, of = [requests[i] for i in rows], scores[rows] if len(rows) < len(requests) else scores
        of = head.gather(of) if restricted else of
        of /= torch.tensor([[1 if r.params.greedy else r.params.temperature] for r in some], device=of.device)
        if restricted:
            values, tokens = _left(of, [r.params for r in some])
            _add_noise(values, some, tokens)
            ids[rows] = tokens.gather(1, values.argmax(dim=1, keepdim=True)).squeeze(1)
        else:
            _add_noise(of, some, torch.arange(head.rows.start, head.rows.stop, device=scores.device).expand_as(of))
            ids[rows] = head.argmax(of)
    return ids


def _add_noise(scores: torch.Tensor, requests: Sequence[Request], tokens: torch.Tensor) -> None:
    """Adds Gumbel noise to scores (B, n) of `tokens` (B, n), in place, unless the request is greedy."""
    at_once = len(scores) if scores.is_cuda else max(1, IN_CACHE // scores.shape[1])
    for start in range(0, len(scores), at_once):
        rows = slice(start, start + at_once)
        keys = [_key(r.seed, len(r.tokens)) for r in requests[rows]]
        factor, offset = torch.tensor(keys, dtype=torch.int32, device=scores.device).split(1, dim=1)
        x = tokens[rows].int() * factor + offset
        for shift, odd in ((16, 0x7FEB352D), (15, -0x7B935975), (16, 1)):
            x = (x ^ (x >> shift & (1 << 32 - shift) - 1)) * odd
        # Between 0 and 1, finest towards 0, where the largest noise comes from.
        uniform = (x.float() * 2**-32 + (0.5 + 2**-33)).clamp_(max=1 - 2**-24)
        noise = uniform.neg_().log1p_().neg_().log_().neg_()
        greedy = torch.tensor([[r.params.greedy] for r in requests[rows]], device=scores.device)
        scores[rows] += noise.masked_fill_(greedy, 0.0)


def _key(seed: int, position: int) -> tuple[int, int]:
    """Two numbers of 32 bits, the first odd."""
    factor, offset = struct.unpack("ii", hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest())
    return factor | 1, offset


def _penalise(row: torch.Tensor, request: Request, rows: range) -> None:
    """Penalises tokens of the request in `row`, the scores of vocabulary `rows`, in place."""
    p = request.params

    def mine(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the ids that are in `rows`, counted from its start, and how often each is there."""
        local = [i - rows.start for i in ids if rows.start <= i < rows.stop]
        unique, counts = torch.tensor(local, dtype=torch.int64, device=row.device).unique(return_counts=True)
        return unique, counts

    if p.repetition_penalty != 1:
        ids, _ = mine(request.tokens)
        row[ids] = torch.where(row[ids] > 0, row[ids] / p.repetition_penalty, row[ids] * p.repetition_penalty)
    ids, counts = mine(request.output_ids)
    row[ids] -= p.frequency_penalty * counts + p.presence_penalty


def _left(scores: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """What top_k, top_p of what that leaves, and then min_p leave of each row (B, vocab), as in vLLM: scores (B, n), largest
    first, -inf for what is gone, and the tokens that they are of (B, n)."""
    vocab, device = scores.shape[1], scores.device
    limits = [[p.top_k if 0 < p.top_k < vocab else vocab] for p in params]
    top_k, top_p, min_p = (
        torch.tensor(x, device=device) for x in (limits, [[p.top_p] for p in params], [[p.min_p] for p in params])
    )
    n = max([FEW, *(p.top_k + 1 for p in params)])
    while True:
        n = min(n, vocab)
        values, tokens = kernels.top(scores, n)
        values.masked_fill_(values < values.gather(1, top_k.clamp(max=n) - 1), -torch.inf)
        total = values.logsumexp(1, keepdim=True)
        if [vocab] in limits:
            total = total.where(top_k < vocab, scores.logsumexp(1, keepdim=True))
        probabilities = (values - total).exp()
        gone = (probabilities.cumsum(1) - probabilities >= top_p) | (probabilities < min_p * probabilities[:, :1])
        gone[:, 0] = False  # the first stays, however small top_p is
        values.masked_fill_(gone, -torch.inf)
        if n == vocab or values[:, -1].isneginf().all():
            return values, tokens
        n *= 8
