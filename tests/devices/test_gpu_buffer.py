# SPDX-License-Identifier: Apache-2.0
"""GPU buffers without their kernel, on a stand-in: several allocations at once, events, pinned memory, availability.

White-box: the account of pinned memory is a private class of the adapter.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

from kvxfer import Endpoint, KVCache, registry
from kvxfer.buffers.base import Completion, pack_all, unpack_all
from kvxfer.errors import TransferFailedError, UnavailableError, UnsupportedBufferError
from kvxfer.memory.copies import Copy, StridedLoop
from kvxfer.testing.oracle import noise

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the kernel of GPU buffers is written in Triton")

from kvxfer_gpu import EventCompletion  # noqa: E402
from kvxfer_gpu._streams import Pinned  # noqa: E402
from tests.devices.host_gpu import HostGpu, InterpretedGpu, RowsBuffer  # noqa: E402

TOKENS, HALF = 12, 32


def i64(*values):
    return np.array(values, dtype=np.int64)


def tensor_of(nbytes, seed):
    return torch.from_numpy(np.frombuffer(noise(nbytes, seed), np.uint8).copy())


def runtime_of(base, **changes):
    """A new class of buffers, so that it shares no streams with those of other tests."""
    return type("Buffer", (RowsBuffer,), {"runtime": type("Runtime", (base,), changes)})


@pytest.mark.parametrize("base", [HostGpu, InterpretedGpu])
def test_allocations_are_packed_together(base):
    """K and V in separate allocations become one chunk and come out of it, and no other byte is touched."""
    moved = []

    class Counting(base):
        def move(self, task, *more):
            moved.append(task)
            super().move(task, *more)

    kind = type("Buffer", (RowsBuffer,), {"runtime": Counting})
    tensors = [tensor_of(TOKENS * HALF, seed) for seed in (1, 2)]
    loop = StridedLoop(TOKENS, HALF, 2 * HALF)
    shares = [
        (kind(tensor), [Copy(i64(0), i64(at), i64(0), i64(0), (loop,), HALF)])
        for tensor, at in zip(tensors, (0, HALF), strict=True)
    ]
    out = np.full(TOKENS * 2 * HALF + 2, 0xAA, np.uint8)
    for copy in pack_all(shares, out[1:-1]):
        assert copy.wait(30)
    expected = np.stack([tensor.numpy().reshape(TOKENS, HALF) for tensor in tensors], axis=1)
    assert out[1:-1].tobytes() == expected.tobytes()
    assert out[0] == out[-1] == 0xAA
    assert len(moved) == 2 if base is HostGpu else 1 <= len(moved) <= 2
    data = np.frombuffer(noise(TOKENS * 2 * HALF, 3), np.uint8)
    back = StridedLoop(TOKENS, 2 * HALF, HALF)
    shares = [
        (share[0], [Copy(i64(at), i64(0), i64(0), i64(0), (back,), HALF)])
        for share, at in zip(shares, (0, HALF), strict=True)
    ]
    for copy in unpack_all(shares, data):
        assert copy.wait(30)
    wanted = data.reshape(TOKENS, 2, HALF)
    for tensor, half in zip(tensors, (0, 1), strict=True):
        assert tensor.numpy().tobytes() == wanted[:, half].tobytes()


def test_layers_of_one_plan_are_one_task():
    """Copies that differ only in their buffer are one launch, however many layers there are."""
    moved = []

    def move(self, task, *more):
        moved.append(task)
        HostGpu.move(self, task, *more)

    kind = runtime_of(HostGpu, move=move, kernel_moves_all=lambda *_: True)
    whole = tensor_of(8 * 1024, 4)  # one storage, so that the stand-in's operations reach all of it
    blocks, rows = i64(512, 0), i64(0, 256)
    shares = [(kind(whole[i * 1024 :][:1024]), [Copy(i64(0), i64(i * 512), blocks, rows, (), 256)]) for i in range(8)]
    out = np.zeros(8 * 512, np.uint8)
    for copy in pack_all(shares, out):
        assert copy.wait(30)
    assert out.tobytes() == whole.numpy().reshape(8, 2, 2, 256)[:, ::-1, 0].tobytes()
    assert [task.runs for task in moved] == [16]


class Event:
    """A fake event, whose end and failure the test sets."""

    def __init__(self):
        self.ended, self.error = False, None

    def record(self, stream):
        pass

    def query(self):
        if self.error:
            raise self.error
        return self.ended

    def synchronize(self):
        self.ended = True
        self.query()


def test_an_event_is_a_completion():
    """It is done when the GPU has reached the event; the last step on the host runs once, before the completion is done."""
    event, done = Event(), []
    completion = EventCompletion(event, lambda: done.append(1))
    assert isinstance(completion, Completion)
    assert not completion.done and not completion.wait(0.0) and not completion.wait(0.01) and not done
    event.ended = True
    assert completion.done and done == [1]
    assert completion.wait() and completion.wait(0.0) and completion.done and done == [1]
    waited = EventCompletion(Event(), lambda: done.append(2))
    assert waited.wait() and done == [1, 2]


@pytest.mark.parametrize("timeout_s", [None, 1.0])
def test_a_gpu_that_fails(timeout_s):
    """Work at which a GPU failed has ended, `wait` raises a named error, and the last step on the host does not run."""
    event = Event()
    event.error = RuntimeError("an illegal memory access was encountered")
    completion = EventCompletion(event, lambda: pytest.fail("its bytes are not there"))
    for _ in range(2):
        with pytest.raises(TransferFailedError, match="illegal memory access"):
            completion.wait(timeout_s)
        assert completion.done


def test_a_host_that_cannot_finish():
    """Where the last copy on the host fails, the completion fails."""

    def finish():
        raise MemoryError("no more")

    event = Event()
    event.ended = True
    completion = EventCompletion(event, finish)
    assert completion.done
    with pytest.raises(TransferFailedError, match="no more"):
        completion.wait()


@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_work_has_ended_when_an_error_is_raised(direction):
    """If a part of the work cannot be started, the parts before it have ended when the error is raised, and the next call works."""
    events, moved = [], []

    class Watched(Event):
        def __init__(self):
            super().__init__()
            events.append(self)

        def record(self, stream):
            self.ended = False

    class Failing(HostGpu):
        def event(self):
            return Watched()

        def move(self, task, *more):
            moved.append(task)
            if len(moved) == 2:
                raise RuntimeError("no more kernels")
            super().move(task, *more)

    kind = type("Buffer", (RowsBuffer,), {"runtime": Failing})
    tensor, memory = tensor_of(4096, 6), np.zeros(4096, np.uint8)
    copies = [Copy(i64(at), i64(at), i64(0), i64(0), (), nbytes) for at, nbytes in ((0, 100), (2048, 200))]
    with pytest.raises(RuntimeError, match="no more kernels"):
        getattr(kind(tensor), direction)(copies, memory)
    assert [event.ended for event in events] == [True]
    before = tensor.numpy().tobytes()
    assert getattr(kind(tensor), direction)(copies, memory).wait()
    assert (memory if direction == "pack" else tensor.numpy())[2048:2248].tobytes() == (
        before[2048:2248] if direction == "pack" else bytes(200)
    )


def test_a_chunk_that_failed_fails_no_other():
    """After a chunk whose last step on the host failed, the next chunk on the same stream is packed."""
    kind, tensor, out = runtime_of(HostGpu), tensor_of(4096, 7), np.zeros(4096, np.uint8)
    whole = [Copy(i64(0), i64(0), i64(0), i64(0), (), 4096)]
    out.flags.writeable = True
    first = kind(tensor).pack(whole, out)
    out.flags.writeable = False  # so that to finish it is refused
    with pytest.raises(TransferFailedError):
        first.wait(30)
    out.flags.writeable = True
    assert kind(tensor).pack(whole, out).wait(30)
    assert out.tobytes() == tensor.numpy().tobytes()


def test_memory_that_cannot_be_pinned(caplog):
    """Bytes arrive all the same, and the log names the cost and the remedy."""

    def pin(memory):
        raise TransferFailedError("cudaHostRegister: error 1")

    kind = runtime_of(HostGpu, pin=staticmethod(pin))
    tensor = tensor_of(4096, 5)
    arena = np.zeros(4096, np.uint8)
    with caplog.at_level(logging.WARNING):
        assert kind.prepare_staging(arena) is None
        assert kind(tensor).pack([Copy(i64(0), i64(0), i64(0), i64(0), (), 4096)], arena).wait(30)
    assert arena.tobytes() == tensor.numpy().tobytes()
    assert "cannot be pinned" in caplog.text and "ulimit -l" in caplog.text


def test_pinned_memory_is_known_until_it_is_forgotten():
    """Of pinned memory each part is found, the same one each time; of memory that was forgotten none is, found before or not."""
    memory, other = (np.frombuffer(bytearray(noise(1 << 12, seed)), np.uint8) for seed in (5, 6))
    pinned, undone = Pinned(), []
    forget = pinned.add(memory, lambda: undone.append(True))
    for length in range(1, 300):
        part = memory[length : 2 * length]
        assert pinned.find(part) is pinned.find(part)
        assert pinned.find(part).numpy().tobytes() == part.tobytes()
    assert pinned.find(other) is None and pinned.find(other[:0]) is None
    forget()
    forget()
    assert undone == [True]
    assert all(pinned.find(memory[length : 2 * length]) is None for length in range(1, 300))


def test_chunks_of_any_length():
    """Chunks of more lengths than are cached are packed and unpacked correctly."""
    kind = runtime_of(HostGpu)
    cache, chunk = tensor_of(1 << 16, 7), np.zeros(1 << 16, np.uint8)
    buffer, twin = kind(cache), kind(torch.zeros(1 << 16, dtype=torch.uint8))
    rng = np.random.default_rng(8)
    for _ in range(100):
        number, step = int(rng.integers(1, 60)), int(rng.integers(1, 64)) * 4
        blocks, lined = rng.permutation(128)[:number] * 512, np.arange(number) * step
        assert buffer.pack([Copy(i64(0), i64(0), blocks, lined, (), step)], chunk).wait(10)
        expected = [cache.numpy()[at : at + step].tobytes() for at in blocks]
        assert chunk[: number * step].tobytes() == b"".join(expected)
        assert twin.unpack([Copy(i64(0), i64(0), lined, blocks, (), step)], chunk).wait(10)
        assert [twin.array.numpy()[at : at + step].tobytes() for at in blocks] == expected


def test_the_arena_is_pinned_as_long_as_its_endpoint_lives():
    """Exactly the arena is pinned, once for all buffers of a cache, and no longer than the endpoint is open."""
    pins = []

    def pin(memory):
        pins.append((memory.ctypes.data, len(memory)))
        return lambda: pins.append("undone")

    kind = runtime_of(HostGpu, pin=staticmethod(pin))
    layers = {f"layers.{i}": torch.zeros(4, 2, 16, 64, dtype=torch.float16) for i in range(3)}
    with Endpoint(KVCache.from_layers(layers, buffers=kind), "inproc") as endpoint:
        arena = endpoint.staging.memory
        assert pins == [(arena.address, arena.nbytes)]
    assert pins == [(arena.address, arena.nbytes), "undone"]


def test_what_is_no_gpu_memory_is_refused():
    """Tensors of another device, read-only ones and those of two allocations are refused with a named error."""
    cuda = type("Cuda", (RowsBuffer,), {"devices": ("cuda",)})
    with pytest.raises(UnsupportedBufferError, match="is on cpu, not in cuda memory"):
        cuda(torch.zeros(8))
    with pytest.raises(UnsupportedBufferError, match="not of one allocation"):
        RowsBuffer(torch.zeros(8), torch.zeros(8))
    with pytest.raises(UnsupportedBufferError, match="at least one array"):
        RowsBuffer()


@pytest.mark.parametrize(
    ("name", "what"), [("cuda", "CUDA"), ("cuda-staged", "CUDA"), ("rocm", "ROCm|AMD"), ("rocm-staged", "ROCm|AMD")]
)
def test_a_machine_without_such_a_gpu(name, what):
    """The registry says in one sentence what is missing here, and loads the class where nothing is."""
    assert name in registry.names("buffers")
    why = registry.why_unavailable(name, "buffers")
    if why is None:
        assert registry.load(name, "buffers").why_unavailable() is None
        return
    with pytest.raises(UnavailableError, match=what):
        registry.load(name, "buffers")


def test_without_pytorch():
    """Where PyTorch is not installed, the adapters say that it is missing."""
    code = (
        "import sys; sys.modules['torch'] = None; from kvxfer import registry;"
        "print([registry.why_unavailable(name, 'buffers') for name in ('cuda', 'rocm')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.count("PyTorch is not installed") == 2
