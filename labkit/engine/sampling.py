"""Choosing the next token from logits that are spread over the tensor-parallel ranks by vocabulary.

Sampling is an argmax: adding Gumbel noise to logits / temperature and taking the largest is a draw from their softmax
(the Gumbel-max trick). Noise is made for the whole vocabulary from (seed, position), and each rank uses its part, so the
drawn token depends on neither layout nor batch.
"""

import torch

from labkit.engine.scheduler import Step
from labkit.parallel.tensor import VocabParallelHead


def sample(logits: torch.Tensor, step: Step, head: VocabParallelHead) -> torch.Tensor:
    """Ids (B,) for logits (B, this rank's part of the vocabulary), the same on every tp rank."""
    params = [r.params for r in step.requests]
    if all(p.temperature == 0 for p in params):
        return head.argmax(logits.float())
    restricted = any(p.temperature > 0 and (p.top_p < 1 or p.top_k > 0) for p in params)
    # Which tokens are in the top p or k is a question about the whole row.
    scores = (head.gather(logits) if restricted else logits).float()
    vocab = head.parts[-1].stop
    for row, request, position in zip(scores, step.requests, step.positions, strict=True):
        p = request.params
        if p.temperature == 0:
            continue
        row /= p.temperature
        if restricted:
            _restrict(row, p.top_k, p.top_p)
        noise = _gumbel(request.seed, position, vocab).to(row.device)
        row += noise if restricted else noise[head.rows.start : head.rows.stop]
    return scores.argmax(dim=-1) if restricted else head.argmax(scores)


def _gumbel(seed: int, position: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)
    return -torch.empty(vocab).exponential_(generator=generator).log()


def _restrict(row: torch.Tensor, top_k: int, top_p: float) -> None:
    """Sets all but the top tokens of `row` (vocab,) to -inf, in place. top_k first, then top_p of what is left, as vLLM does."""
    if 0 < top_k < row.shape[0]:
        row[row < row.topk(top_k).values[-1]] = -torch.inf
    if top_p < 1:
        ordered, order = row.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        row[order[before >= top_p]] = -torch.inf
