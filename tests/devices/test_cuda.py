# SPDX-License-Identifier: Apache-2.0
"""Tests that need a real GPU: its events, pinned memory, and caches of an engine on it."""

from __future__ import annotations

import itertools

import pytest

from kvxfer import Endpoint, KVCache, LeaseRef
from kvxfer.config import Settings

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the kernel of GPU buffers is written in Triton")

from kvxfer_cuda import CudaBuffer, EventCompletion, StagedCudaBuffer  # noqa: E402

_reason = CudaBuffer.why_unavailable()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 4, 20, 2, 16, 64


def tensors(order: str, device: str, fill: int | None = None):
    """A tensor for each layer, each an allocation of its own, seen as [block, head, token, content]."""
    found = {}
    for layer in range(LAYERS):
        shape = (BLOCKS, HEADS, TOKENS, CONTENT) if order == "HND" else (BLOCKS, TOKENS, HEADS, CONTENT)
        whole = torch.randint(0, 1 << 14, shape, dtype=torch.int16, device=device)
        if fill is not None:
            whole.fill_(fill)
        found[f"layers.{layer}"] = (
            whole.view(torch.float16) if order == "HND" else whole.view(torch.float16).transpose(1, 2)
        )
    torch.cuda.synchronize()
    return found


def endpoint(layers, buffers, **options):
    cache = KVCache.from_layers(layers, buffers=buffers)
    return Endpoint(cache, "inproc", settings=Settings(staging_nbytes=1 << 18), **options)


@pytest.mark.parametrize("target", ["HND", "NHD"])
def test_the_layers_of_an_engine(target):
    """A tensor for each layer on the GPU is a cache like any other; the request's blocks arrive, and no others change."""
    theirs, mine = tensors("HND", "cuda"), tensors(target, "cuda")
    before = {name: tensor.clone() for name, tensor in mine.items()}
    blocks, into = [3, 17, 4, 9], [1, 2, 0, 19]
    with endpoint(theirs, StagedCudaBuffer) as producer, endpoint(mine, StagedCudaBuffer) as consumer:
        ref = LeaseRef.mint(producer=producer.name, addresses=[producer.address])
        producer.announce(ref)
        producer.publish(ref, blocks)
        transfer = consumer.read(ref, into)
        assert transfer.wait(30) and transfer.error is None
    torch.cuda.synchronize()
    for name, tensor in mine.items():
        before[name][into] = theirs[name][blocks]
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_blocks_are_read_when_the_gpu_has_written_them():
    """Blocks that a stream has not written yet when they are published after its event are waited for, and arrive whole."""
    theirs, mine = tensors("HND", "cuda", 1), tensors("NHD", "cuda", 2)
    with endpoint(theirs, StagedCudaBuffer) as producer, endpoint(mine, StagedCudaBuffer) as consumer:
        ref = LeaseRef.mint(producer=producer.name, addresses=[producer.address])
        producer.announce(ref)
        transfer = consumer.read(ref, [0, 1, 2, 3])
        stream, events = torch.cuda.Stream(), []
        with torch.cuda.stream(stream):
            for value, block in enumerate([5, 6, 7, 8], start=10):
                torch.cuda._sleep(100_000_000)  # clock cycles
                for tensor in theirs.values():
                    tensor.view(torch.int16)[block].fill_(value)
                events.append(torch.cuda.Event())
                events[-1].record(stream)
        assert not events[-1].query()
        for known in (1, 2, 3):
            producer.publish(ref, [5, 6, 7, 8][:known], complete=False, after=[EventCompletion(events[known - 1])])
        producer.publish(ref, [5, 6, 7, 8], after=[EventCompletion(events[-1])])
        assert transfer.wait(30) and transfer.error is None
    for name, tensor in mine.items():
        for block, value in itertools.zip_longest([0, 1, 2, 3], range(10, 14)):
            assert (tensor[block].contiguous().view(torch.int16) == value).all(), (name, block)


def test_blocks_that_the_gpu_still_uses_are_not_written():
    """Pending writes of a stream to blocks of the target are complete before the read writes to them."""
    theirs, mine = tensors("HND", "cuda", 1), tensors("NHD", "cuda", 2)
    with endpoint(theirs, StagedCudaBuffer) as producer, endpoint(mine, StagedCudaBuffer) as consumer:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # clock cycles
            for tensor in mine.values():
                tensor.view(torch.int16)[:4].fill_(3)
            mark = consumer.cache.buffers[0].mark()
        assert not mark.done
        transfer = consumer.read(producer.lease([5, 6, 7, 8]), [0, 1, 2, 3], after=[mark])
        assert transfer.wait(30)
        assert mark.done
    torch.cuda.synchronize()
    for tensor in mine.values():
        assert (tensor[:4].contiguous().view(torch.int16) == 1).all()


def test_the_arena_is_pinned_while_an_endpoint_lives():
    """Chunks lie in pinned memory, exactly the arena, and no longer than the endpoint lives."""
    import ctypes

    with endpoint(tensors("HND", "cuda"), StagedCudaBuffer) as one:
        arena = one.staging.memory
        whole = torch.frombuffer((ctypes.c_uint8 * arena.nbytes).from_address(arena.address), dtype=torch.uint8)
        assert whole.is_pinned()
        assert whole[-1:].is_pinned()
    assert not whole.is_pinned()
