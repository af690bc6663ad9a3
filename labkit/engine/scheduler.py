"""Which requests run in which step: the same decisions on every rank, from the same requests and the same sampled ids.

Requests live in pipeline lanes. While one lane's step is on stage 1, another's is on stage 0; with as many lanes as stages
every stage has work. No clock, no random order and nothing that differs between ranks enters here.
"""

from collections import deque
from dataclasses import dataclass

from labkit.engine.requests import Request
from labkit.split import even


@dataclass
class Step:
    """One forward pass of one lane: whole prompts of new requests (prefill), or one token for each running one."""

    prefill: bool
    requests: list[Request]
    slots: list[int]  # KV cache slot of each request
    tokens: list[list[int]]  # the input tokens of each
    starts: list[int]  # the position of the first of them

    @property
    def positions(self) -> list[int]:
        """Position of the token that this step will sample, for each request."""
        return [start + len(t) for start, t in zip(self.starts, self.tokens, strict=True)]


class Scheduler:
    """Lanes of requests over a fixed number of KV cache slots.

    Args:
        requests: in order of arrival.
        lanes: how many batches take turns.
        slots: KV cache slots of each lane.
        max_prefill: prompt tokens that one step takes at most (a single longer prompt is taken whole).
    """

    def __init__(self, requests: list[Request], lanes: int, slots: int, max_prefill: int) -> None:
        self.waiting = deque(requests)
        self.running: list[dict[int, Request]] = [{} for _ in range(lanes)]  # lane -> slot -> request
        self.slots, self.max_prefill = slots, max_prefill

    @property
    def done(self) -> bool:
        return not self.waiting and not any(self.running)

    def next_step(self, lane: int) -> Step | None:
        """What `lane` does on its turn: prefill as long as somebody waits and it has room, else decode. None: nothing."""
        running = self.running[lane]
        # An even share of all requests, so that one lane doesn't take what would keep the others busy.
        total = len(self.waiting) + sum(len(r) for r in self.running)
        share = min(self.slots, len(even(total, len(self.running))[lane]))
        free = [slot for slot in range(lane * self.slots, (lane + 1) * self.slots) if slot not in running]
        joining: dict[int, Request] = {}
        room = self.max_prefill
        while self.waiting and len(running) + len(joining) < share:
            room -= len(self.waiting[0].prompt_ids)
            if room < 0 and joining:
                break
            joining[free[len(joining)]] = self.waiting.popleft()
        if joining:
            running.update(joining)
            requests = list(joining.values())
            return Step(True, requests, list(joining), [r.prompt_ids for r in requests], [0] * len(requests))
        if not running:
            return None
        slots = sorted(running)
        requests = [running[slot] for slot in slots]
        starts = [len(r.prompt_ids) + len(r.output_ids) - 1 for r in requests]
        return Step(False, requests, slots, [[r.output_ids[-1]] for r in requests], starts)

    def commit(self, lane: int, step: Step, ids: list[int]) -> None:
        """Takes the sampled `ids`, one for each request of `step`; finished requests leave their slots."""
        for request, slot, token in zip(step.requests, step.slots, ids, strict=True):
            request.output_ids.append(token)
            if request.finish_reason:
                del self.running[lane][slot]
