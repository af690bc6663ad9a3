"""Choosing the next token from logits that are spread over the ranks of a replica by vocabulary.

Sampling is an argmax: adding Gumbel noise to logits / temperature and taking the largest is a draw from their softmax
(the Gumbel-max trick). Noise is made for the whole vocabulary from (seed, position), and each rank uses its part, so the
drawn token depends on neither layout nor batch.
"""

from collections.abc import Sequence

import torch

from labkit.engine.requests import Request
from labkit.parallel.tensor import VocabParallelHead


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
    restricted = any(request.params.restricts for request in requests)
    # Which tokens are in the top p or k is a question about the whole row.
    scores = head.gather(scores) if restricted else scores
    vocab = head.parts[-1][-1].stop
    for row, request in zip(scores, requests, strict=True):
        p = request.params
        if p.greedy:
            continue
        row /= p.temperature
        if restricted:
            _restrict(row, p.top_k, p.top_p, p.min_p)
        noise = _gumbel(request.seed, len(request.tokens), vocab).to(row.device)
        row += noise if restricted else noise[head.rows.start : head.rows.stop]
    return scores.argmax(dim=-1) if restricted else head.argmax(scores)


def _gumbel(seed: int, position: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)
    return -torch.empty(vocab).exponential_(generator=generator).log()


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


def _restrict(row: torch.Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Sets all but the top tokens of `row` (vocab,) to -inf, in place: top_k, top_p of what is left, then min_p, as vLLM does."""
    if 0 < top_k < row.shape[0]:
        row[row < row.topk(top_k).values[-1]] = -torch.inf
    if top_p < 1:
        ordered, order = row.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        row[order[1:][before[1:] >= top_p]] = -torch.inf  # the first stays, however small top_p is
    if min_p > 0:
        probabilities = row.softmax(dim=-1)
        row[probabilities < min_p * probabilities.max()] = -torch.inf
