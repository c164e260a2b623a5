# SPDX-License-Identifier: Apache-2.0
"""The cost model: what descriptors, runs, bytes and chunks cost, and how long a transfer in chunks takes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvxfer.buffers.host_copy import Effort


@dataclass(frozen=True)
class Costs:
    """Constants of the cost model, as ``kvxfer bench calibrate`` measures them. The defaults are those of a small x86-64 machine.

    Attributes:
        descriptor_s: time of the transfer engine for one more descriptor.
        wire_nbytes_per_s: rate of the transfer engine with long descriptors.
        run_s: time of a device for one more run when it packs or unpacks.
        pack_nbytes_per_s, unpack_nbytes_per_s: rates at which a device packs and unpacks long runs.
        land_s: time for one more chunk that the target fetches without the source's help.
        chunk_s: time for one more chunk that the source packs, messages included, while others are in flight.
        ask_s: from the request for the first chunk until it is there, without the time to pack it.
        index_s: time for one more run that is found by an index, as for scattered blocks.
        second_pass_nbytes_per_s: rate of the second copy that is needed if the runs are in a row on neither side.
        write_gain: how many times as fast the producer's WRITE moves the bytes of a read as the consumer's READ does. With
            ``move_by=auto`` it decides between the two where both are safe (`kvxfer.runtime.direction`).
        lookup_s, convert_s: time for one more element that is converted, by a table (float8) and by arithmetic.
    """

    descriptor_s: float = 1.6e-6
    wire_nbytes_per_s: float = 6e9
    run_s: float = 1e-9
    pack_nbytes_per_s: float = 8e9
    unpack_nbytes_per_s: float = 6e9
    land_s: float = 200e-6
    chunk_s: float = 400e-6
    ask_s: float = 900e-6
    index_s: float = 45e-9
    second_pass_nbytes_per_s: float = 6e9
    lookup_s: float = 0.9e-9
    convert_s: float = 2.2e-9
    write_gain: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ConfigError(f"cost {name} must be a positive number, not {value!r}")

    @classmethod
    def load(cls, path: str | Path | None = None, *, environ: Mapping[str, str] | None = None) -> Costs:
        """Read the file that ``kvxfer bench calibrate`` wrote: ``path``, else ``KVXFER_COSTS``; without either, the defaults.

        Raises:
            ConfigError: the file cannot be read, or does not hold costs.
        """
        environ = os.environ if environ is None else environ
        where = path or environ.get("KVXFER_COSTS") or None
        if where is None:
            return cls()
        try:
            held = json.loads(Path(where).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read the costs in {where}: {error}") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(held, dict) or not set(held) <= set(known):
            raise ConfigError(f"{where} holds no costs; known are {', '.join(known)}")
        return cls(**held)

    def save(self, path: str | Path) -> None:
        """Write a file for `load`. Raises OSError."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def wire_s(self, descriptors: float, nbytes: float) -> float:
        """Seconds of the transfer engine for these descriptors and bytes."""
        return descriptors * self.descriptor_s + nbytes / self.wire_nbytes_per_s

    def effort_s(self, effort: Effort) -> float:
        """Seconds of a device in addition to `pack_s` or `unpack_s`."""
        found = effort.indexed_runs * self.index_s + effort.twice_nbytes / self.second_pass_nbytes_per_s
        return found + effort.looked_up * self.lookup_s + effort.computed * self.convert_s

    def pack_s(self, runs: float, nbytes: float) -> float:
        """Seconds of the source's device to pack."""
        return runs * self.run_s + nbytes / self.pack_nbytes_per_s

    def unpack_s(self, runs: float, nbytes: float) -> float:
        """Seconds of the target's device to unpack."""
        return runs * self.run_s + nbytes / self.unpack_nbytes_per_s


class StageTimes(NamedTuple):
    """Time in each stage of a transfer in chunks, in seconds. The stages overlap: the slowest one sets the interval of chunks.

    Attributes:
        start_s: from the request for the first chunk until it is there, without the time to pack it.
        source_s: to pack all bytes at the source.
        target_s: to move and unpack all bytes at the target, while the source packs the next ones.
        chunk_s: for each chunk, at the target.
    """

    start_s: float
    source_s: float
    target_s: float
    chunk_s: float

    def latency_s(self, chunks: float) -> float:
        """Seconds from the request for the first of so many equal chunks until it is unpacked."""
        return self.start_s + (self.source_s + self.target_s) / chunks + self.chunk_s

    def interval_s(self, chunks: float) -> float:
        """Seconds from the end of one of so many equal chunks to the end of the next."""
        return max(self.source_s / chunks, self.target_s / chunks + self.chunk_s)

    def seconds(self, chunks: float) -> float:
        """Seconds from the request for the first of so many equal chunks until the last one is unpacked."""
        return self.latency_s(chunks) + (chunks - 1) * self.interval_s(chunks)
