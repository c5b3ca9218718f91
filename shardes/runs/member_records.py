"""Members' results on their way into the run directory."""

from collections.abc import Mapping
from dataclasses import replace

from shardes.es.member import MemberResult
from shardes.runs.recorder import RunRecorder
from shardes.runs.reporting import Reporter


class MemberRecords:
    """Records what the members of one iteration earned, as soon as it is known.

    Args:
        iteration: The iteration.
        shows_samples: Whether answers of its first member are kept for people to read.
        recorder: Writes to the run directory.
        reporter: Tells people of the members.
    """

    def __init__(
        self, iteration: int, *, shows_samples: bool, recorder: RunRecorder, reporter: Reporter
    ) -> None:
        self._iteration, self._shows_samples = iteration, shows_samples
        self._recorder, self._reporter = recorder, reporter

    def add(self, result: MemberResult) -> None:
        """Record the result of a member."""
        self._write_samples(result)
        self._recorder.record({"type": "member", "iteration": self._iteration, **result.record()})
        self._reporter.end_member(result.num_tokens)

    def add_portion(self, number: int, result: MemberResult) -> None:
        """Record what a member earned by the portion of a round of racing."""
        if number == 0:
            self._write_samples(result)
        place = {"iteration": self._iteration, "round": number, "member": result.member}
        self._recorder.record({"type": "portion", **place, "part": result.part})

    def add_stopped(self, result: MemberResult, *, known: Mapping[int, MemberResult]) -> None:
        """Record the result of a member that has stopped racing, unless the journal has it."""
        result = replace(result, samples=())  # they came with its first portion
        if (before := known.get(result.member)) is None or before.record() != result.record():
            self.add(result)

    def _write_samples(self, result: MemberResult) -> None:
        if self._shows_samples:
            self._recorder.write_samples(result.samples, iteration=self._iteration, member=result.member)
