# SPDX-License-Identifier: Apache-2.0
"""The two processes of the demo: what the prefill side and the decode side of an engine would do with kvxfer.

Each makes a KV cache as engines do (one array per layer), hands it to an `Endpoint`, and fills it with a pattern that
tells every byte from every other. The lease travels from one to the other as JSON, by way of the parent, which plays the
router.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvxfer.buffers.cache import KVCache
from kvxfer.cli import pattern
from kvxfer.cli.planning.forecast import unmerged
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.errors import KvxferError, PeerTimeoutError
from kvxfer.planner.plan import plan
from kvxfer.protocol.lease_ref import LeaseRef
from kvxfer.protocol.transfer import LeaseExpired, LeaseReleased, LeaseRevoked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvxfer.layout.spec import CacheSpec

PREFILL_SEED = 1
DECODE_SEED = 2
REUSED_SEED = 3
"""Patterns of the producer's blocks, of the consumer's blocks before a read, and of blocks that the producer reused."""


_WAIT_FOR_ROOM_S = 0.05
"""Time between acquire and read, as in an engine that waits for free blocks; the grant arrives meanwhile."""


@dataclass(frozen=True)
class Geometry:
    """Geometry of a model's KV cache on one rank, in bfloat16 (stored as 16-bit integers: NumPy has no such type)."""

    layers: int
    heads: int
    head_dim: int
    block_tokens: int = 16

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block: all layers, K and V."""
        return self.layers * self.heads * self.block_tokens * self.head_dim * 2 * 2

    def arrays(self, blocks: int) -> npt.NDArray[Any]:
        """Memory of a cache as ``[layer, block, head, token, content]``."""
        shape = (self.layers, blocks, self.heads, self.block_tokens, 2 * self.head_dim)
        return np.zeros(shape, dtype=np.uint16)


@dataclass(frozen=True)
class Outcome:
    """Outcome of one read.

    Attributes:
        error: name and text of the error; empty if there is none.
        wrong_nbytes: bytes of the read blocks that differ from the producer's, and of all other blocks that changed.
        foreign_nbytes: bytes in the target of the request that reused the blocks after the lease had ended.
        copy_s: time of a plain memcpy of as many bytes in the same process, just before.
    """

    seconds: float = 0.0
    nbytes: int = 0
    runs: int = 0
    descriptors: int = 0
    via: str = ""
    error: str = ""
    wrong_nbytes: int = 0
    checked_nbytes: int = 0
    foreign_nbytes: int = 0
    copy_s: float = 0.0


class _Party:
    def __init__(self, geometry: Geometry, blocks: int, agent: str, seed: int) -> None:
        self.array: npt.NDArray[Any] = geometry.arrays(blocks)
        pattern.fill(self.array, seed)  # touches every page: the first access to memory takes longer than a transfer
        cache = KVCache.from_layers({f"layers.{i}": self.array[i] for i in range(geometry.layers)}, dtype="bfloat16")
        self.endpoint: Endpoint = Endpoint(cache, agent, settings=Settings.resolve())

    def close(self) -> None:
        """Close the endpoint."""
        self.endpoint.close()


class DemoProducer(_Party):
    """The producer's process of the demo."""

    def __init__(self, geometry: Geometry, blocks: int, agent: str) -> None:
        super().__init__(geometry, blocks, agent, PREFILL_SEED)

    def spec(self) -> CacheSpec:
        """Spec of its cache, from which the consumer computes the number of runs before merging."""
        return self.endpoint.cache.spec

    def lease(self, request: str, blocks: Sequence[int]) -> str:
        """Lease the complete blocks of a request; returns the lease reference as JSON."""
        return self.endpoint.lease(np.asarray(blocks), request=request).to_json()

    def end(self, text: str) -> str:
        """Wait until the lease ends; returns how, in one word."""
        ref = LeaseRef.from_json(text)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for event in self.endpoint.poll(timeout_s=0.1):
                if isinstance(event, (LeaseReleased, LeaseExpired, LeaseRevoked)) and event.token == ref.token:
                    return type(event).__name__.removeprefix("Lease").lower()
        raise PeerTimeoutError(f"the lease of {ref.request!r} has not ended")

    def take_back(self, text: str, blocks: Sequence[int]) -> str:
        """Revoke a lease and reuse its blocks for another request; returns how the lease ended."""
        self.endpoint.revoke(LeaseRef.from_json(text), "the producer needs its blocks")
        ended = self.end(text)
        pattern.fill(self.array, REUSED_SEED, np.asarray(blocks))
        return ended

    def refill(self, blocks: Sequence[int]) -> None:
        """Undo `take_back`."""
        pattern.fill(self.array, PREFILL_SEED, np.asarray(blocks))


class DemoConsumer(_Party):
    """The consumer's process of the demo."""

    def __init__(self, geometry: Geometry, blocks: int, agent: str, most_nbytes: int) -> None:
        super().__init__(geometry, blocks, agent, DECODE_SEED)
        self._scratch = np.ones(most_nbytes, dtype=np.uint8)
        self._text = ""

    def acquire(self, text: str) -> None:
        """Acquire the lease of a request, until there are free blocks for it."""
        self._text = text
        self.endpoint.acquire(LeaseRef.from_json(text))
        time.sleep(_WAIT_FOR_ROOM_S)

    def read(self, spec: CacheSpec, source: Sequence[int], target: Sequence[int], skip: int) -> Outcome:
        """Read the blocks of the acquired lease without the first ``skip``, and check the whole cache."""
        ref = LeaseRef.from_json(self._text)
        wanted, into = np.asarray(source)[skip:], np.asarray(target)
        copy_s = self._copy(_nbytes(self.array, into))
        first = skip * self.endpoint.cache.spec.groups[0].block_tokens
        transfer = self.endpoint.read(ref, into, tokens=(first, None))
        try:
            transfer.wait()
        except KvxferError as error:
            return Outcome(error=_told(error), copy_s=copy_s)
        finally:
            self.endpoint.poll()
        rank_plan = plan(spec, self.endpoint.cache.spec).rank_plans[0]
        runs = unmerged(rank_plan, rank_plan.match(wanted, into))
        rest = np.setdiff1d(np.arange(self.array.shape[1]), into)
        wrong = pattern.wrong_bytes(self.array, PREFILL_SEED, into, wanted)
        wrong += pattern.wrong_bytes(self.array, DECODE_SEED, rest)
        outcome = Outcome(
            seconds=transfer.seconds,
            nbytes=transfer.nbytes,
            runs=runs,
            descriptors=transfer.descriptors,
            via=transfer.via,
            wrong_nbytes=wrong,
            checked_nbytes=self.array.nbytes,
            copy_s=copy_s,
        )
        pattern.fill(self.array, DECODE_SEED, into)
        return outcome

    def begin(self, target: Sequence[int]) -> None:
        """Begin to read the acquired lease, without waiting."""
        self._transfer = self.endpoint.read(LeaseRef.from_json(self._text), np.asarray(target))

    def finish(self, source: Sequence[int], target: Sequence[int]) -> Outcome:
        """Wait for the read, and check whose bytes arrived."""
        error = ""
        try:
            self._transfer.wait()
        except KvxferError as failed:
            error = _told(failed)
        self.endpoint.poll()
        into = np.asarray(target)
        wrong = pattern.wrong_bytes(self.array, PREFILL_SEED, into, np.asarray(source))
        foreign = pattern.right_nbytes(self.array, REUSED_SEED, into, np.asarray(source))
        return Outcome(error=error, wrong_nbytes=wrong, foreign_nbytes=foreign)

    def _copy(self, nbytes: int) -> float:
        """Seconds of a plain memcpy of ``nbytes`` bytes out of the cache in one thread; median of three."""
        flat = self.array.reshape(-1).view(np.uint8)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            np.copyto(self._scratch[:nbytes], flat[:nbytes])
            times.append(time.perf_counter() - begin)
        return sorted(times)[1]


def _told(error: KvxferError) -> str:
    return f"{type(error).__name__}: {error}"


def _nbytes(array: npt.NDArray[Any], blocks: npt.NDArray[Any]) -> int:
    return len(blocks) * (array.nbytes // int(array.shape[1]))
