"""What the rank keeps of an episode: its calls, and what they have been answered."""

import hashlib
import json
from concurrent.futures import Future
from dataclasses import dataclass, field

from shardes.environments.base import StepResult
from shardes.environments.hosted import Call
from shardes.environments.losses import Losses


@dataclass(eq=False)
class Record:
    """An episode, from which it can be begun again in another process.

    Attributes:
        key: Its number in the pool.
        calls: All calls so far, from its reset on; the last one may not be answered yet.
        digests: Of each call's answer.
        pending: Is given the outcome of the last call.
        num_sent: Calls that the process that plays it now has been sent.
        losses: Processes lost during its calls.
        is_over: True once no further call is answered.
    """

    key: int
    calls: list[Call] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    pending: "Future[StepResult] | None" = None
    num_sent: int = 0
    losses: Losses = field(default_factory=Losses)
    is_over: bool = False

    @property
    def is_waiting(self) -> bool:
        """Return whether a call is not answered yet."""
        return not self.is_over and len(self.digests) < len(self.calls)

    def is_replayed(self, index: int) -> bool:
        """Return True if a call has been answered before."""
        return index < len(self.digests)

    def agrees(self, index: int, result: StepResult) -> bool:
        """Return True if a call is answered as it was before."""
        return result.failure is None and self.digests[index] == _digest(result)

    def answer(self, result: StepResult) -> None:
        """Take in the outcome of the last call, and hand it on."""
        self.digests.append(_digest(result))
        self.losses = Losses()
        self.resolve(result)

    def fail(self, failure: str) -> None:
        """End the episode, and give the reason to whoever waits for it."""
        self.resolve(StepResult(failure=failure))

    def resolve(self, result: StepResult) -> None:
        """Hand on the outcome of the last call; a failure, or an end, is the last one."""
        if result.failure is not None or result.is_done:
            self.is_over = True
            self.calls.clear()
            self.digests.clear()
        if self.pending is not None and not self.pending.done():
            self.pending.set_result(result)


def _digest(result: StepResult) -> bytes:
    said = json.dumps([result.observation, result.reward, result.is_done])
    return hashlib.sha256(said.encode()).digest()
