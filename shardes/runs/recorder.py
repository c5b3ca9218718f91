"""Opening a run's directory and writing to it: rank 0 does, and the other ranks learn what it holds."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shardes.config.schema import Config
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.runs.directory import RunDirectory
from shardes.runs.journal import JOURNAL_VERSION, History
from shardes.runs.resume import ResumeState
from shardes.utils.timers import PhaseTimer


class RunRecorder:
    """Records a run in its directory, on rank 0; elsewhere nothing is written.

    Args:
        config: The run's configuration.
        identity: The base model and the noise, as the journal's header has them.
        settings: The keys that a resumed run must share with the journal.
        world: All ranks.
        timer: Where the time goes.

    Attributes:
        settings: The keys that a resumed run must share with the journal.
        directory: The run directory, on rank 0 while it is open; else None.
    """

    def __init__(
        self,
        config: Config,
        *,
        identity: Mapping[str, Any],
        settings: dict[str, Any],
        world: Group,
        timer: PhaseTimer,
    ) -> None:
        self._config = config
        self._identity = identity
        self.settings = settings
        self._world = world
        self._timer = timer
        self.directory: RunDirectory | None = None

    def open(self, on_open: Callable[[RunDirectory], None]) -> ResumeState:
        """Open the run directory, and return what it knows already; a collective of all ranks.

        Args:
            on_open: Called on rank 0 with the directory, before anything else is done with it.

        Raises:
            UserError: On all ranks, if the directory cannot be used.
        """
        state: dict[str, Any] = {}
        if self._world.is_main:
            try:
                config = self._config.model_dump(mode="json")
                header = {"type": "header", "journal_version": JOURNAL_VERSION, **self._identity}
                header |= {"settings": self.settings, "config": config}
                self.directory = RunDirectory(self._config, header=header)
                on_open(self.directory)
                state = ResumeState.from_history(self.directory.history).to_json()
            except UserError as error:
                state = {"error": str(error)}
        state = self._world.broadcast_json(state)
        if "error" in state:
            raise UserError(state["error"])
        return ResumeState.from_json(state)

    @property
    def history(self) -> History | None:
        """Return what the journal holds, on rank 0; None elsewhere."""
        return None if self.directory is None else self.directory.history

    def record(self, record: dict[str, Any], *, durable: bool = False) -> None:
        """Append a record to the journal.

        Args:
            record: JSON-able values by name; ``type`` among them.
            durable: Whether it is on disk before anything else happens.
        """
        if self.directory is not None:
            with self._timer("io"):
                self.directory.record(record, durable=durable)

    def write_samples(self, samples: Iterable[Mapping[str, Any]], **place: Any) -> None:
        """Write answers to samples.jsonl, each with its place.

        They come before the journal entry of what they are samples of: without that, they are dropped and
        written again after a crash.
        """
        if self.directory is not None:
            for sample in samples:
                self.directory.samples.write({**place, **sample})

    def close(self) -> None:
        """Close the files and let go of the directory."""
        if self.directory is not None:
            self.directory.close()
