"""A run's directory: one job at a time, and files that survive the death of that job."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shardes.config.consent import with_consent
from shardes.config.loading import dump_config, load_run_config
from shardes.config.schema import Config
from shardes.errors import StorageError, UserError
from shardes.runs.journal import History, Journal, commit_of, engine_of, read_journal
from shardes.runs.lock import DirectoryLock
from shardes.utils.closing import Closing
from shardes.utils.files import AppendFile, jsonl_text, write_atomically
from shardes.utils.reading import parse_json, read_whole_lines

logger = logging.getLogger(__name__)


class LineFile:
    """A JSONL file that is written line by line, each flushed.

    Args:
        path: The file.
        keep: Returns whether a line stays. Others are removed at the start: a dead job wrote them about work
            that is done again. A torn or damaged line is removed with all that follows it.

    Attributes:
        num_lines: Number of lines.
        first_untold: The iteration after the last one of which a line was ever written, removed or not.
    """

    def __init__(self, path: Path, *, keep: Callable[[dict[str, Any]], bool]) -> None:
        self.path = path
        found = read_lines(path)
        lines = [line for line in found if keep(line)]
        self.first_untold = max((line["iteration"] for line in found), default=-1) + 1
        self.num_lines = len(lines)
        write_lines(path, lines)
        self._file = AppendFile(path)

    def write(self, line: dict[str, Any]) -> None:
        """Append one object.

        Raises:
            StorageError: It cannot be written.
        """
        self._file.append(json.dumps(line).encode() + b"\n")
        self.num_lines += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file up to a torn or damaged one; none if it does not exist.

    Raises:
        UserError: It cannot be read, or is no regular file.
    """
    lines: list[dict[str, Any]] = []
    try:
        for text in read_whole_lines(path):
            line = parse_json(text)
            if not isinstance(line, dict) or not all(
                type(number) is int for number in (line.get("iteration"), line.get("member", 0))
            ):
                raise ValueError("not a line of a run")
            lines.append(line)
    except FileNotFoundError:
        pass
    except ValueError:
        logger.warning("%s: line %d is damaged; what follows it is dropped", path, len(lines) + 1)
    except OSError as error:
        raise UserError(f"run.dir: {path} cannot be read: {error.strerror}") from None
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSONL file by one of these lines; ``read_lines`` reads it.

    Raises:
        OSError: It cannot be written; the old file is still there.
    """
    write_atomically(path, jsonl_text(lines))


class RunDirectory(Closing):
    """The files of one run, held by one job; used by rank 0 alone.

    Args:
        config: The run's configuration.
        header: Header of the run's journal; compared with the journal's own if there is one.

    Attributes:
        journal: The open journal.
        metrics: metrics.jsonl, one line an iteration.
        samples: samples.jsonl, some answers of evaluations and of members.

    Raises:
        UserError: The directory is in use, damaged, cannot be written, or holds another run.
    """

    def __init__(self, config: Config, *, header: dict[str, Any]) -> None:
        self.path = config.run.dir
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: {self.path} cannot be made ({error.strerror})") from None
        try:
            with ExitStack() as stack:
                self._open(stack, config, header)
                self._stack = stack.pop_all()
        except StorageError as error:
            raise UserError(f"run.dir: {error}") from None
        except OSError as error:
            raise UserError(
                f"run.dir: {error.filename or self.path} cannot be written ({error.strerror}); make it "
                "writable, make room, or give another run.dir. What it holds is as it was"
            ) from None

    def _open(self, stack: ExitStack, config: Config, header: dict[str, Any]) -> None:
        """Take the lock, then open or begin the files; ``stack`` closes them."""
        self._lock = DirectoryLock(self.path / ".lock")
        stack.callback(self._lock.release)
        self.journal = stack.enter_context(Journal(self.path / "journal.jsonl"))
        if self.journal.dropped_bytes:
            logger.warning("the journal's last line was incomplete and was dropped")
        self._begin_or_resume(config, header)
        write_atomically(self.path / "config.yaml", dump_config(config))
        done = len(self.journal.history.updates)
        self.metrics = LineFile(self.path / "metrics.jsonl", keep=lambda line: line["iteration"] < done)
        stack.callback(self.metrics.close)
        self.samples = LineFile(self.path / "samples.jsonl", keep=self._is_recorded)
        stack.callback(self.samples.close)

    def _is_recorded(self, sample: dict[str, Any]) -> bool:
        """Return whether the journal has the evaluation or the member that gave an answer."""
        iteration = sample["iteration"]
        if "member" in sample:
            history, member = self.history, sample["member"]
            is_racing = iteration == len(history.updates) and (0, member) in history.portions
            return is_racing or member in history.members.get(iteration, {})
        return iteration in self.history.evaluations

    def record(self, record: dict[str, Any], *, durable: bool = False) -> None:
        """Append to the journal; see ``Journal.append``.

        Raises:
            StorageError: It cannot be written, or another job has taken the directory over.
        """
        if durable:
            self._lock.check()
        self.journal.append(record, durable=durable)

    @property
    def history(self) -> History:
        """Content of the journal."""
        return self.journal.history

    def _begin_or_resume(self, config: Config, header: dict[str, Any]) -> None:
        known = self.history.header
        if known is None:
            self.journal.append(header, durable=True)
            return
        if config.run.resume == "never":
            raise UserError(
                f"run.dir: {self.path} already holds a run of {len(self.history.updates)} iterations, and "
                "run.resume is 'never'; give another run.dir, or run.resume=auto to go on with it"
            )
        done = len(self.history.updates)
        if done > config.es.iterations:
            raise UserError(
                f"es.iterations: got {config.es.iterations}, but {self.path} has {done} iterations already; "
                "give at least that, or another run.dir. Earlier weights can be had with: shardes export "
                "--iteration"
            )
        differences = _differences(known, header)
        if differences:
            raise UserError(
                f"run.dir: {self.path} holds a run that was made with other settings; give another "
                "run.dir, or the settings it was made with:\n" + "\n".join(differences)
            )
        if "task.date" in header["settings"] and "task.date" not in known["settings"]:
            logger.warning(
                "prompts have a date in them, and the journal of an older version does not say which: it is "
                "now %s; for another: task.date",
                header["settings"]["task.date"],
            )
        self._go_on_with(engine_of(header), may_differ=config.run.resume_engine == "any")

    def _go_on_with(self, engine: dict[str, Any], *, may_differ: bool) -> None:
        """Compare an engine with the one that the run has had so far, and record it if it is another.

        Raises:
            UserError: It is another, and must not be.
        """
        known = self.history.engines[-1]["engine"]
        if engine == known:
            return
        if not may_differ:
            raise UserError(
                f"run.dir: {self.path} holds a run whose members were judged by another engine, so that "
                "those rewards would not be of one kind with what is to come; give the engine back, or go on "
                "all the same with run.resume_engine=any:\n"
                + "\n".join(_differing_lines(known, engine, now="this job"))
            )
        iteration = len(self.history.updates)
        logger.info("iteration %d: the run goes on with another engine: %s", iteration, engine)
        self.journal.append({"type": "engine", "iteration": iteration, "engine": engine}, durable=True)

    def close(self) -> None:
        """Close the files and release the directory."""
        self._stack.close()


_EXPLAINED = {
    "task.prompts sha256": " (the tokens of all prompts: by the tokenizer, its chat template and the data)"
}


def _differences(known: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return one line for each key on which two headers differ."""
    old, new = _comparable(known), _comparable(wanted)
    for key in _LATER_SETTINGS:
        if key not in old:
            new.pop(key, None)
    return _differing_lines(old, new, now="this configuration")


def _differing_lines(old: dict[str, Any], new: dict[str, Any], *, now: str) -> list[str]:
    return [
        f"  {key}: the run has {json.dumps(old.get(key))}, {now} {json.dumps(new.get(key))}"
        f"{_EXPLAINED.get(key, '')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


# Settings that journals of older versions do not have: which prompts their runs asked is not known.
_LATER_SETTINGS = ("task.prompts sha256", "task.date")

# Keys of a header for readers: compared in another way, or of no influence on the run.
_NOT_COMPARED = (
    "type",
    "settings",
    "shardes_version",
    "config",
    "parameters",
    "update_version",
    "base_headers_sha256",
    "is_exact",
    "engine",
)


def _comparable(header: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in header.items() if key not in _NOT_COMPARED}
    settings = {key: value for key, value in header["settings"].items() if key != "rollout.engine"}
    return rest | settings


def read_run_journal(run_dir: Path) -> tuple[dict[str, Any], History, int, int]:
    """Return the header and all of a run's journal, its length in whole lines, and its length, both in bytes.

    Raises:
        UserError: There is none, or it is empty.
    """
    path = run_dir / "journal.jsonl"
    if not path.exists():
        raise UserError(f"RUN_DIR {run_dir}: {path} does not exist; give the directory of a run")
    history, _, good_bytes, num_bytes = read_journal(path)
    if history.header is None:
        raise UserError(f"RUN_DIR {run_dir}: its journal is empty; nothing can be replayed")
    return history.header, history, good_bytes, num_bytes


def read_run(
    run_dir: Path, *, base: Path | None, backend: str, is_trusted: bool = False
) -> tuple[Config, dict[str, Any], History]:
    """Return configuration, header and journal of a run whose weights are to be restored.

    The configuration is for the ranks of this job, whatever the run had.

    Args:
        run_dir: The run directory.
        base: The base model's directory, or its name on the hub; None: the run's ``model.path``.
        backend: Value of ``parallel.backend``.
        is_trusted: Whether the person has consented to run code of the model directory.

    Raises:
        UserError: The directory holds no run, or the run asks for code to run without consent.
    """
    changes: dict[str, Any] = {"run.dir": str(run_dir), "parallel.backend": backend}
    changes |= {"parallel.deepspeed": None, "parallel.shard_size": None, "rollout.gather": "auto"}
    # Nothing is answered, and a run directory should not decide how an engine is started.
    changes |= {"rollout.engine": "auto", "rollout.kv_cache_gib": None, "rollout.batch_invariant": False}
    changes |= {"rollout.vllm": {}}
    if base is not None:
        changes |= {"model.path": str(base), "model.revision": None}
    config = load_run_config(run_dir, changes)
    header, history, *_ = read_run_journal(run_dir)
    if commit := commit_of(header, config.model.hub_id):
        config = config.model_copy(update={"model": config.model.model_copy(update={"revision": commit})})
    own = () if base is None else ("model.path",)
    origin = run_dir / "config.yaml"
    config = with_consent(config, origin=origin, is_trusted=is_trusted, sections=("model",), own=own)
    return config, header, history
