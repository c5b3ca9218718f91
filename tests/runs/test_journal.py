"""The journal and the run directory: what survives a death, and which damage is found."""

import copy
import errno
import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.config.loading import dump_config, parse_config
from shardes.errors import StorageError, UserError
from shardes.runs import lock
from shardes.runs.directory import LineFile, RunDirectory, read_lines, write_atomically
from shardes.runs.journal import Journal, read_journal
from tests.helpers.models import tree

HEADER = {
    "type": "header",
    "settings": {"es.sigma": 0.1, "es.seed": 3},
    "base": "abc",
    "shardes_version": "1",
    "journal_version": 2,
    "noise_version": 1,
    "base_headers_sha256": "0",
    "base_weights_digest": "0" * 16,
    "parameters_sha256": "0",
    "parameters": [],
    "config": {"model": {"path": "m"}},
}


def member(iteration, index, reward):
    counts = {"num_failures": 0, "num_tokens": 7}
    return {"type": "member", "iteration": iteration, "member": index, "reward": reward, **counts}


def update(iteration, coefficients=()):
    step = {"sigma": 1e-3, "alpha": 1e-4}
    return {"type": "update", "iteration": iteration, "coefficients": list(coefficients), **step}


def weights(iteration, digest="00ff" * 4):
    return {"type": "weights", "iteration": iteration, "digest": digest}


def evaluation(iteration, reward=0.5):
    return {"type": "evaluation", "iteration": iteration, "reward": reward}


RECORDS = [
    HEADER,
    evaluation(0),
    member(0, 0, 1 / 3),
    member(0, 1, None),
    update(0, [0.25, -1e-7]),
    weights(1, "0123456789abcdef"),
    member(1, 1, -5e-324),
    member(1, 0, 1.7976931348623157e308),
    update(1, [0.25, -1e-7]),
    weights(2),
    evaluation(2, None),
    member(2, 0, 0.1 + 0.2),
]


@pytest.fixture
def path(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        for record in RECORDS:
            journal.append(record, durable=record["type"] == "update")
    return tmp_path / "journal.jsonl"


def records_of(history):
    """What a history holds, in one comparable shape."""
    return (history.header, history.updates, history.members, history.evaluations, history.digests)


def history_of(records):
    members, evaluations, digests = {}, {}, {}
    for record in records:
        if record["type"] == "member":
            members.setdefault(record["iteration"], {})[record["member"]] = record
        if record["type"] == "evaluation":
            evaluations[record["iteration"]] = record
        if record["type"] == "weights":
            digests[record["iteration"]] = record["digest"]
    header = records[0] if records else None
    return (header, [r for r in records if r["type"] == "update"], members, evaluations, digests)


def refusal(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_journal(path)
    with pytest.raises(UserError):
        Journal(path)
    assert path.read_bytes() == data, "a damaged journal must not be changed"
    return str(caught.value)


def test_what_is_appended_is_read_back_exactly(path):
    history, _, good_bytes, total_bytes = read_journal(path)
    assert records_of(history) == history_of(RECORDS)
    assert good_bytes == total_bytes == path.stat().st_size
    with Journal(path) as journal:
        assert journal.dropped_bytes == 0
        assert records_of(journal.history) == history_of(RECORDS)


def test_a_journal_that_does_not_exist_is_empty(tmp_path):
    history, link, good_bytes, total_bytes = read_journal(tmp_path / "none.jsonl")
    assert records_of(history) == (None, [], {}, {}, {})
    assert (link, good_bytes, total_bytes) == ("", 0, 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_reopening_goes_on_with_the_same_chain(tmp_path, path):
    other = tmp_path / "other.jsonl"
    for record in RECORDS:
        with Journal(other) as journal:
            journal.append(record)
    assert other.read_bytes() == path.read_bytes()


def test_a_torn_line_is_dropped_wherever_the_file_was_cut(path):
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        count = data.count(b"\n", 0, cut)
        begin = data.rfind(b"\n", 0, cut) + 1
        assert records_of(read_journal(path)[0]) == history_of(RECORDS[:count])
        assert path.stat().st_size == cut, "reading must not change the file"
        with Journal(path) as journal:
            assert journal.dropped_bytes == cut - begin
            assert records_of(journal.history) == history_of(RECORDS[:count])
            for record in RECORDS[count:]:
                journal.append(record)
        assert path.read_bytes() == data


def test_a_torn_header_leaves_an_empty_journal(path):
    line = path.read_bytes().splitlines(keepends=True)[0]
    for cut in range(len(line)):
        path.write_bytes(line[:cut])
        with Journal(path) as journal:
            assert journal.history.header is None
            assert journal.dropped_bytes == cut


def flipped(data, position, value):
    changed = bytearray(data)
    changed[position] = value
    return bytes(changed)


def test_any_flipped_byte_in_an_earlier_line_is_found(path):
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, len(data) - 1)
    draw = random.Random(0)
    for position in range(last):
        number = data.count(b"\n", 0, position) + 1
        for value in {data[position] ^ (1 << draw.randrange(8)), draw.randrange(256)} - {data[position], 13}:
            path.write_bytes(flipped(data, position, value))
            with pytest.raises(UserError) as caught:
                read_journal(path)
            assert f"{path} line {number} is damaged" in str(caught.value)


def test_a_byte_that_became_a_carriage_return_is_found(path):
    data = path.read_bytes()
    position = data.index(b"-1e-07")  # '-' and the carriage return differ by one bit
    assert data[position] ^ 13 == 32
    number = data.count(b"\n", 0, position) + 1
    assert f"line {number} is damaged" in refusal(path, flipped(data, position, 13))


def test_a_complete_but_changed_last_line_is_found(path):
    data = path.read_bytes()
    for position in range(data.rindex(b"\n", 0, len(data) - 1) + 1, len(data) - 1):
        path.write_bytes(flipped(data, position, data[position] ^ 1))
        with pytest.raises(UserError, match=f"line {len(RECORDS)} is damaged"):
            read_journal(path)


def test_removed_swapped_doubled_and_foreign_lines_are_found(path, tmp_path):
    lines = path.read_bytes().splitlines(keepends=True)
    for i in range(len(lines) - 1):
        assert f"line {i + 1} is damaged" in refusal(path, b"".join(lines[:i] + lines[i + 1 :]))
        swapped = [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]
        assert f"line {i + 1} is damaged" in refusal(path, b"".join(swapped))
    for i in range(len(lines)):
        assert f"line {i + 2} is damaged" in refusal(path, b"".join(lines[: i + 1] + lines[i:]))
    # Lines of another run, each in its right place.
    with Journal(tmp_path / "foreign.jsonl") as journal:
        for record in [HEADER | {"base": "abd"}, *RECORDS[1:]]:
            journal.append(record)
    foreign = (tmp_path / "foreign.jsonl").read_bytes().splitlines(keepends=True)
    assert "line 5 is damaged" in refusal(path, b"".join(lines[:4] + foreign[4:]))


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b"null\n", b'{"type":"member"}\n', b"\xff\xfe\n", b"\0\0\0\n"]
)
def test_a_line_that_is_no_record_is_found(path, line):
    assert f"line {len(RECORDS) + 1} is damaged" in refusal(path, path.read_bytes() + line)


@pytest.mark.parametrize(
    "record",
    [
        *(HEADER, member(1, 0, 1.0), member(3, 0, 1.0), update(1), update(3), evaluation(1), weights(1)),
        {"type": "else"},
    ],
    ids=str,
)
def test_a_record_that_does_not_follow_is_refused(path, record):
    before = path.read_bytes()
    with Journal(path) as journal, pytest.raises(ValueError, match="record"):
        journal.append(record)
    assert path.read_bytes() == before


def test_a_refused_record_does_not_harm_the_next(path):
    with Journal(path) as journal:
        with pytest.raises(ValueError, match="header"):
            journal.append(HEADER)
        journal.append(update(2))
    assert len(read_journal(path)[0].updates) == 3


def test_the_first_record_must_be_the_header(tmp_path):
    with Journal(tmp_path / "j") as journal, pytest.raises(ValueError, match="header must be the first"):
        journal.append(update(0))


def test_a_number_that_is_none_is_never_written(path):
    before = path.read_bytes()
    for value in (float("nan"), float("inf")):
        with Journal(path) as journal, pytest.raises(ValueError, match="JSON"):
            journal.append(update(2, [value]))
    assert path.read_bytes() == before
    line = before.splitlines()[-1].replace(b"0.30000000000000004", b"NaN")
    assert f"line {len(RECORDS) + 1} is damaged" in refusal(path, before + line + b"\n")


def test_damage_is_answered_with_the_way_to_do_the_rest_again(path):
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    changed = b"".join([*lines[:7], lines[7].replace(b"1", b"2"), *lines[8:]])
    command = refusal(path, changed).rpartition("truncate --size=")[2].split()
    os.truncate(command[1], int(command[0]))
    assert records_of(read_journal(path)[0]) == history_of(RECORDS[:7])


def test_a_journal_of_a_later_version_is_refused(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append(HEADER | {"journal_version": 99})
    with pytest.raises(UserError, match="journal version 99, of a later shardes"):
        read_journal(tmp_path / "j")


class FullDisk:
    """Takes the first bytes of a write and then no more."""

    def __init__(self, monkeypatch, journal, *, num_bytes, number):
        self._room, self._number = num_bytes, number
        self._file = journal._file._file
        monkeypatch.setattr(journal._file, "_file", self)

    def write(self, data):
        if not self._room:
            raise OSError(self._number, os.strerror(self._number))
        count = self._file.write(bytes(data[: self._room]))
        self._room -= count
        return count

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("num_bytes", [0, 1, 60])
def test_a_record_that_does_not_fit_leaves_no_trace(path, monkeypatch, number, num_bytes):
    before = path.read_bytes()
    with Journal(path) as journal:
        FullDisk(monkeypatch, journal, num_bytes=num_bytes, number=number)
        with pytest.raises(StorageError) as caught:
            journal.append(update(2), durable=True)
    assert path.read_bytes() == before
    message = str(caught.value)
    assert str(path) in message
    assert os.strerror(number) in message
    assert "start the same command again" in message


def test_a_short_write_is_gone_on_with(path, monkeypatch):
    wanted = path.with_name("other.jsonl")
    wanted.write_bytes(path.read_bytes())
    with Journal(wanted) as journal:
        journal.append(update(2))
    with Journal(path) as journal:
        disk = FullDisk(monkeypatch, journal, num_bytes=7, number=errno.EIO)
        write = disk.write

        def in_two_parts(data):
            count = write(data)
            disk._room = 10_000
            return count

        monkeypatch.setattr(disk, "write", in_two_parts)
        journal.append(update(2))
    assert path.read_bytes() == wanted.read_bytes()


def test_a_record_that_could_not_be_brought_to_the_disk_is_taken_back(path, monkeypatch):
    before = path.read_bytes()
    with Journal(path) as journal, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(StorageError, match="broken"):
            journal.append(update(2), durable=True)
    assert path.read_bytes() == before


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(iterations=st.lists(st.lists(st.one_of(st.none(), finite), min_size=1, max_size=4), max_size=4))
def test_history_keeps_every_number_exactly(tmp_path_factory, iterations):
    records = [HEADER]
    for i, rewards in enumerate(iterations):
        records += [member(i, j, reward) for j, reward in enumerate(rewards)]
        records.append(update(i, [r if r is not None and abs(r) < 1e38 else 0.5 for r in rewards]))
    path = tmp_path_factory.mktemp("history") / "journal.jsonl"
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
        assert records_of(journal.history) == history_of(records)
    # As text, which tells 0.0 from -0.0.
    read = json.dumps(records_of(read_journal(path)[0]), sort_keys=True)
    assert read == json.dumps(history_of(records), sort_keys=True)


@pytest.fixture
def settings_of(tmp_path, monkeypatch):
    """Configurations over one run directory; a lock that is held is noticed at once."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0)

    def make(**changes):
        config = tree(tmp_path, model="no/model", run_dir=tmp_path / "a" / "run", **changes)
        return parse_config(config, source="test")

    return make


def job(config, *, header=HEADER, records=(), lines=()):
    """What one job leaves in a run directory; returns what it found there."""
    with RunDirectory(config, header=header) as run:
        found = records_of(copy.deepcopy(run.history)), run.metrics.num_lines, run.samples.num_lines
        for record in records:
            run.journal.append(record)
        for line in lines:
            run.metrics.write(line)
            run.samples.write(line)
    return found


def test_a_new_directory_holds_the_configuration_and_the_header(settings_of):
    config = settings_of()
    assert job(config) == (history_of([HEADER]), 0, 0)
    assert (config.run.dir / "config.yaml").read_text() == dump_config(config)
    assert records_of(read_journal(config.run.dir / "journal.jsonl")[0]) == history_of([HEADER])
    assert not list(config.run.dir.glob("*.tmp"))


def test_a_second_holder_is_refused(settings_of):
    with RunDirectory(settings_of(), header=HEADER) as run:
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on host "):
            RunDirectory(settings_of(), header=HEADER)
        run.journal.append(update(0))  # the first holder goes on
    assert len(read_journal(run.path / "journal.jsonl")[0].updates) == 1


def test_what_only_describes_a_run_is_not_compared(settings_of):
    model = {"model": {"path": "n"}}
    described = {
        "config": model | {"run": {"dir": "a"}},
        "parameters": [[0, "w", [2]]],
        "base_headers_sha256": "1",
    }
    job(settings_of(), header=HEADER | described)
    other = {"config": model, "parameters": [], "base_headers_sha256": "2"}
    assert job(settings_of(), header=HEADER | other)[0] == history_of([HEADER | described])


def test_a_job_whose_directory_was_taken_over_writes_no_update(settings_of):
    with RunDirectory(settings_of(), header=HEADER) as run:
        text = (run.path / ".lock").read_text()
        (run.path / ".lock").write_text(text.replace('"pid": ', '"pid": 9'))
        with pytest.raises(StorageError, match=f"taken over by process 9{os.getpid()} on host"):
            run.record(update(0), durable=True)
    assert read_journal(run.path / "journal.jsonl")[0].updates == []


def test_a_closed_directory_is_free(settings_of):
    first = RunDirectory(settings_of(), header=HEADER)
    first.close()
    job(settings_of())
    assert first.path.exists()  # the first object still lives


def test_resume_never_refuses_a_directory_that_holds_a_run(settings_of):
    config = settings_of(run__resume="never")
    job(config, records=[update(0)])
    with pytest.raises(UserError, match="already holds a run of 1 iterations"):
        job(config)
    assert job(settings_of())[0] == history_of([HEADER, update(0)])


def test_every_difference_to_the_run_is_named_and_nothing_else(settings_of):
    job(settings_of())
    other = HEADER | {"settings": {"es.sigma": 0.2, "es.new": None, "es.seed": 3}, "base": "x"}
    with pytest.raises(UserError) as caught:
        job(settings_of(), header=other | {"shardes_version": "2"})
    assert str(caught.value).splitlines()[1:] == [
        '  base: the run has "abc", this configuration "x"',
        "  es.sigma: the run has 0.1, this configuration 0.2",
    ]


def test_another_version_of_the_program_goes_on_with_a_run(settings_of):
    job(settings_of())
    assert job(settings_of(), header=HEADER | {"shardes_version": "2"})[0] == history_of([HEADER])


def test_metrics_and_samples_are_cut_to_what_the_journal_holds(settings_of):
    written = [{"iteration": i, "x": 0.1, "text": chr(0x2028)} for i in range(4)]
    job(settings_of(), records=[evaluation(0), update(0), update(1), evaluation(2)], lines=written)
    metrics, samples = (settings_of().run.dir / name for name in ("metrics.jsonl", "samples.jsonl"))
    for path in (metrics, samples):
        with path.open("a") as file:
            file.write('{"iteration": 0, "to')
    assert job(settings_of(), lines=[{"iteration": 2}])[1:] == (2, 2)
    # Metrics of finished iterations; samples of recorded evaluations, the last of which has no update yet.
    assert read_lines(metrics) == [written[0], written[1], {"iteration": 2}]
    assert read_lines(samples) == [written[0], written[2], {"iteration": 2}]


def test_a_damaged_metrics_line_is_refused_or_mended(settings_of):
    job(settings_of(), records=[update(0), update(1)], lines=[{"iteration": 0}, {"iteration": 1}])
    path = settings_of().run.dir / "metrics.jsonl"
    path.write_bytes(bytes(path.stat().st_size - 1) + b"\n")
    try:
        job(settings_of())
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert read_lines(path) == []  # the trainer writes them anew from the journal


def test_a_damaged_journal_leaves_the_directory_free_and_unchanged(settings_of):
    config = settings_of()
    job(config, records=[update(0)], lines=[{"iteration": 5}])
    path = config.run.dir / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.001", b"0.002"))
    before = {p.name: p.read_bytes() for p in config.run.dir.iterdir()}
    assert before[".lock"] == b""
    for _ in range(2):
        with pytest.raises(UserError, match="line 2 is damaged"):
            job(config)
    assert {p.name: p.read_bytes() for p in config.run.dir.iterdir()} == before


def test_a_directory_that_cannot_be_made_is_refused(settings_of, tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(UserError, match=r"run\.dir: .*cannot be made"):
        RunDirectory(settings_of(), header=HEADER)


@pytest.mark.parametrize("name", [".lock", "journal.jsonl", "config.yaml.tmp", "metrics.jsonl.tmp"])
def test_a_file_that_cannot_be_opened_is_named_and_the_directory_stays_free(settings_of, name):
    config = settings_of()
    (config.run.dir / name).mkdir(parents=True)  # as good as forbidden, and root may everything
    with pytest.raises(
        UserError, match=rf"run\.dir: .*{name}.* cannot be (written \(I|read: it i)s a directory"
    ):
        RunDirectory(config, header=HEADER)
    (config.run.dir / name).rmdir()
    job(config)


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    lines = LineFile(tmp_path / "lines.jsonl", keep=lambda line: True)
    lines.write({"iteration": 0})
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == {"iteration": 0}
    lines.close()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    reader = path.open()
    write_atomically(path, "new é")
    assert reader.read() == "old"  # whoever has it open keeps the whole old text
    reader.close()
    assert path.read_text(encoding="utf-8") == "new é"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
