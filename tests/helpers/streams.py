"""A model of an accelerator's streams on the CPU: who must have waited for whom, by vector clocks.

Everything is computed as always, on tensors in host memory. Besides, each operation is booked on the stream
that was current, with the storages that it reads and writes. A stream or a thread of the host knows of
another what it has waited for. Two accesses to a storage of which one is a write are unordered if the stream
of the later does not know of the earlier: on a device they might happen in the other order, though here they
did not. So are accesses to a storage that the allocator may hand out again while another stream uses it.

What is booked: torch's operators, collectives (on a stream of their own for each group, as NCCL has), the
kernels of the noise and of digests, what files are read into and what snapshots write. Storages that
``mark_host`` was called for are pinned host memory: the host works on them by itself, and copies from and to
them are on the stream.
"""

import collections
import contextlib
import functools
import inspect
import threading
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from shardes import noise
from shardes.distributed.group import Group
from shardes.models.checkpoint import TensorReader

COLLECTIVES = [
    ("all_gather_single", ["input_tensor"], ["output_tensor"]),
    ("all_gather_into_tensor", ["input_tensor"], ["output_tensor"]),
    ("all_gather", ["tensor"], ["tensor_list"]),
    ("all_reduce", [], ["tensor"]),
    ("broadcast", [], ["tensor"]),
    ("gather", ["tensor"], ["gather_list"]),
]
"""Name, what is read and what is written."""
_WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


class Timeline:
    """A stream, or a thread of the host: what it has done, and what it knows of the others."""

    def __init__(self, model, name):
        self.model, self.name = model, name
        self.clock = collections.Counter()

    def tick(self):
        self.clock[self] += 1
        return self.clock[self]

    def learn(self, clock):
        for other, time in clock.items():
            self.clock[other] = max(self.clock[other], time)

    def knows(self, access):
        timeline, time = access
        return timeline is self or self.clock[timeline] >= time

    # As torch's streams

    def wait_stream(self, other):
        self.model.sweep()
        self.learn(other.clock)

    def wait_event(self, event):
        event.wait(self)

    def record_event(self, event=None):
        event = event or self.model.event()
        event.record(self)
        return event

    def synchronize(self):
        self.model.host.learn(self.clock)

    def query(self):
        return True


class Access(tuple):
    """Timeline and time, with the name of what was done."""

    what = ""


class Storage:
    """What was done to a storage."""

    def __init__(self, storage, stream, is_host=False):
        self.ref = StorageWeakRef(storage)
        self.is_host = is_host
        self.renew(stream)

    def renew(self, stream):
        self.stream, self.written, self.read = stream, None, {}
        self.recorded = set()

    def foreign(self):
        """Accesses by other streams than the one that it was allocated on."""
        found = [*self.read.values(), *([self.written] if self.written else [])]
        return [each for each in found if each[0] is not self.stream and each[0] not in self.recorded]


class Booking(TorchDispatchMode):
    """Has torch's operators in a thread booked."""

    def __init__(self, book):
        super().__init__()
        self._book = book

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        return self._book(func, args, kwargs or {})


class Graph:
    """Stands in for torch.cuda.CUDAGraph: a replay books what was captured, and computes nothing."""

    def __init__(self, model, *_, **__):
        self._model, self._operations = model, []

    def capture_begin(self, *_, **__):
        self._model.captured = self._operations

    def capture_end(self):
        self._model.captured = None

    def replay(self):
        for reads, writes, what in self._operations:
            kept = [[each for each in some if not each.ref.expired()] for some in (reads, writes)]
            self._model.access(*kept, what=f"replayed {what}")

    def reset(self):
        self._operations.clear()


class Streams:
    """The model; active as a context, in one process at a time.

    Attributes:
        num_accesses: How many there were.
        num_collectives: How many collectives.
        unordered: What is not ordered: (what, what), as often as it was seen.
    """

    def __init__(self):
        self.report()
        self._storages, self._crossing, self._freed = {}, set(), collections.defaultdict(list)
        self._local, self._lock = threading.local(), threading.RLock()
        self._hosts, self._comm, self._made = {}, {}, []
        self.default = self.make("default")
        self._stack = contextlib.ExitStack()
        self.captured = None

    def report(self):
        """What was seen since the last time."""
        found = {
            "accesses": getattr(self, "num_accesses", 0),
            "collectives": getattr(self, "num_collectives", 0),
            "unordered": [[*what, n] for what, n in sorted(getattr(self, "unordered", {}).items())],
        }
        self.num_accesses = self.num_collectives = 0
        self.unordered = collections.Counter()
        return found

    # Streams

    def make(self, name="side"):
        stream = Timeline(self, name)
        stream.learn(self.host.clock)
        self._made.append(stream)
        return stream

    def event(self, *_, **__):
        event = SimpleNamespace(clock=None)

        def record(stream=None):
            event.clock = collections.Counter((stream or self.current).clock)

        def wait(stream=None):
            self.sweep()
            (stream or self.current).learn(event.clock or {})

        event.record, event.wait = record, wait
        event.synchronize = lambda: self.host.learn(event.clock or {})
        # What this answers depends on time, so that nothing may be concluded from it.
        event.query = lambda: False
        return event

    @property
    def host(self):
        return self._hosts.setdefault(threading.get_ident(), Timeline(self, "host"))

    @property
    def current(self):
        return getattr(self._local, "stream", None) or self.default

    @contextlib.contextmanager
    def on(self, stream):
        before = self.current
        self._local.stream = stream or before
        try:
            yield
        finally:
            self._local.stream = before

    def synchronize(self, *_):
        for stream in [*self._made, *self._comm.values()]:
            self.host.learn(stream.clock)

    # Storages

    def entry(self, tensor, *, is_output=False):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages or self._storages[key].ref.expired():
            if is_output:
                self._allocating()
            self._storages[key] = Storage(storage, self.current)
        return self._storages[key]

    def mark_host(self, *tensors):
        for tensor in tensors:
            self.entry(tensor).is_host = True

    def _allocating(self):
        """The allocator may hand out what was freed on this stream: others must be done with it."""
        known = collections.Counter(self.current.clock)
        self.current.learn(self.host.clock)
        for accesses in self._freed.pop(self.current, []):
            for access in accesses:
                if not self.current.knows(access):
                    self.unordered[access.what, "freed and allocated anew"] += 1
        self.current.clock = known

    def _free(self, entry):
        if entry.foreign():
            self._freed[entry.stream].append(entry.foreign())

    def sweep(self):
        """Note which storages were freed since the last time."""
        with self._lock:
            for entry in [each for each in self._crossing if each.ref.expired()]:
                self._crossing.discard(entry)
                self._free(entry)

    def access(self, reads, writes, *, what, timeline=None):
        """Book an operation on the current stream, or the host where all is in its memory."""
        with self._lock:
            self.sweep()
            reads, writes = list(dict.fromkeys(reads)), list(dict.fromkeys(writes))
            entries = [*reads, *writes]
            if not entries:
                return
            if self.captured is not None:
                self.captured.append((reads, writes, what))
                return
            if timeline is None:
                timeline = self.host if all(e.is_host for e in entries) else self.current
            if timeline is not self.host:
                timeline.learn(self.host.clock)
            access = Access((timeline, timeline.tick()))
            access.what = f"{what} ({timeline.name})"
            for entry in reads:
                self._check(entry.written, access)
                entry.read[timeline] = access
            for entry in writes:
                self._check(entry.written, access)
                for read in entry.read.values():
                    self._check(read, access)
                entry.written, entry.read = access, {}
            self._crossing.update(e for e in entries if timeline is not e.stream)
            self.num_accesses += len(entries)

    def _check(self, earlier, later):
        if earlier is not None and not later[0].knows(earlier):
            self.unordered[earlier.what, later.what] += 1

    # What is booked

    def _operator(self, func, args, kwargs):
        result = func(*args, **kwargs)
        what = func._schema.name.removeprefix("aten::")
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if func.namespace == "c10d" or is_view:
            return result
        reads, writes = [], []
        named = {argument.name: argument for argument in func._schema.arguments}
        given = [*zip(func._schema.arguments, args, strict=False)] + [
            (named[k], v) for k, v in kwargs.items()
        ]
        for argument, value in given:
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            (writes if is_write else reads).extend(self._entries(value))
        is_host = bool(reads) and all(each.is_host for each in [*reads, *writes])
        outputs = self._entries(result, are_outputs=True)
        for each in outputs if is_host else ():
            each.is_host = True
        self.access(reads, writes + ([] if "empty" in what else outputs), what=what)
        is_blocking = what == "copy_" and not kwargs.get("non_blocking", len(args) > 2 and args[2])
        crosses = len({each.is_host for each in [*reads, *writes]}) == 2
        if (what in _WAITING and not is_host) or (is_blocking and crosses):
            self.host.learn(self.current.clock)
        return result

    def _entries(self, tree, *, are_outputs=False):
        return [self.entry(t, is_output=are_outputs) for t in tree_leaves(tree) if torch.is_tensor(t)]

    def _collective(self, function, names):
        """A collective of torch.distributed, with the names of the arguments that it reads and writes."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs).arguments
            read, written = ([e for n in some for e in self._entries(bound.get(n))] for some in names)
            if any(each.is_host for each in read + written):
                raise AssertionError("a collective of tensors in host memory, which NCCL does not have")
            group, is_async = bound.get("group"), bound.get("async_op", False)
            comm = self._comm.setdefault(group, Timeline(self, "nccl"))
            comm.learn(self.current.clock)
            with _disable_current_modes():
                work = function(**(bound | {"async_op": True}))
            self.access(read, written, what=function.__name__, timeline=comm)
            self.num_collectives += 1
            clock = collections.Counter(comm.clock)

            def wait(*_):
                if work is not None:
                    work.wait()
                self.sweep()
                self.current.learn(clock)

            return SimpleNamespace(wait=wait, is_completed=lambda: True) if is_async else wait()

        return call

    def _kernel(self, function, *, reads, writes):
        def call(*args, **kwargs):
            with _disable_current_modes():
                result = function(*args, **kwargs)
            read, written = ([self.entry(args[i]) for i in some] for some in (reads, writes))
            self.access(read, written, what=function.__name__)
            return result

        return call

    def _patch(self, target, name, value):
        self._stack.enter_context(mock.patch.object(target, name, value, create=True))

    def __enter__(self):
        for module in (torch.cpu, torch.cuda):
            self._patch(module, "Stream", lambda *_, **__: self.make())
            self._patch(module, "Event", self.event)
            self._patch(module, "stream", self.on)
            self._patch(module, "current_stream", lambda *_: self.current)
            self._patch(module, "set_stream", lambda s: setattr(self._local, "stream", s))
            self._patch(module, "default_stream", lambda *_: self.default)
            self._patch(module, "synchronize", self.synchronize)
        self._patch(torch.Tensor, "record_stream", lambda t, s: self.entry(t).recorded.add(s))
        self._patch_storages()
        for name, *names in COLLECTIVES:
            if hasattr(dist, name):
                self._patch(dist, name, self._collective(getattr(dist, name), names))

        def gather(group, local, output):
            dist.all_gather_into_tensor(output, local, group=group.process_group)

        self._patch(Group, "gather_tensor", gather)
        self._patch(noise, "perturb", self._kernel(noise.perturb, reads=[0], writes=[1]))
        self._patch(noise, "restore", self._kernel(noise.restore, reads=[0], writes=[1]))
        self._patch(noise, "accumulate", self._kernel(noise.accumulate, reads=[], writes=[0]))
        self._patch(noise, "add", self._kernel(noise.add, reads=[1], writes=[0]))
        self._patch_shardes()
        self._patch_graphs()
        self._patch_threads()
        self._stack.enter_context(Booking(self._operator))
        return self

    def __exit__(self, *exception):
        self._stack.close()

    @contextlib.contextmanager
    def unbooked(self):
        """What torch's operators do here does not count."""
        with _disable_current_modes():
            yield

    def _patch_graphs(self):
        @contextlib.contextmanager
        def capture(graph, *_, stream=None, **__):
            self.synchronize()
            with self.on(stream or self.make("capture")):
                graph.capture_begin()
                try:
                    yield
                finally:
                    graph.capture_end()

        self._patch(torch.cuda, "CUDAGraph", functools.partial(Graph, self))
        self._patch(torch.cuda, "graph", capture)
        self._patch(torch.cuda, "graph_pool_handle", lambda: (0, 0))

    def _patch_shardes(self):
        import shardes.runs.snapshot
        import shardes.weights.master
        import shardes.weights.master_digest

        for module in (shardes.weights.master, shardes.weights.master_digest):
            self._patch(module, "add_digest", self._kernel(module.add_digest, reads=[1], writes=[0]))
        write_values = shardes.runs.snapshot.write_values

        def write(sink, values):
            self.access([self.entry(values)], [], what="write_values")
            self.host.learn(self.current.clock)  # the copy to the host is waited for
            write_values(sink, values)

        self._patch(shardes.runs.snapshot, "write_values", write)
        read = TensorReader.read

        def read_into(reader, name, *, region, out):
            with _disable_current_modes():
                read(reader, name, region=region, out=out)
            self.access([], [self.entry(out)], what="read")

        self._patch(TensorReader, "read", read_into)

    def _patch_storages(self):
        resize = torch.UntypedStorage.resize_

        def resized(storage, size):
            entry = self._storages.get(storage._cdata)
            with self._lock:
                if entry is not None and size == 0:
                    self._free(entry)
                    entry.renew(None)
                elif entry is not None and storage.size() == 0:
                    self._allocating()
                    entry.renew(self.current)
            return resize(storage, size)

        self._patch(torch.UntypedStorage, "resize_", resized)

    def _patch_threads(self):
        start, join, model = threading.Thread.start, threading.Thread.join, self
        clocks = {}

        def started(thread):
            run, known = thread.run, collections.Counter(model.host.clock)

            def body():
                model.host.learn(known)
                try:
                    with Booking(model._operator):
                        run()
                finally:
                    clocks[thread] = model.host.clock
                    model._hosts.pop(threading.get_ident())

            thread.run = body
            start(thread)

        def joined(thread, timeout=None):
            join(thread, timeout)
            model.host.learn(clocks.get(thread, {}))

        self._patch(threading.Thread, "start", started)
        self._patch(threading.Thread, "join", joined)
