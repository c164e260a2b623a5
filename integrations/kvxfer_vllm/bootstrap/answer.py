# SPDX-License-Identifier: Apache-2.0
"""The answer to ``GET /query``: MooncakeConnector's keys (vLLM 0.32), and the side channel of each engine beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

from kvxfer import addresses
from kvxfer.errors import ConfigError
from kvxfer.layout.checks import MAX_RANKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_NBYTES = 1 << 18
"""Size of the longest answer that is read."""

Text = Annotated[str, Meta(min_length=1, max_length=512)]


class KvxferPlace(Struct, frozen=True):
    """Side channel of rank 0 of an engine."""

    address: Text
    v: int = 1


class BootstrapEntry(Struct, frozen=True):
    """One engine: a data parallel rank of a prefill server.

    Attributes:
        engine_id: of vLLM; another one after each start, unless the configuration names it.
        worker_addr: addresses by tensor parallel rank and pipeline stage. Routers do not read it.
        kvxfer: missing in the answer of a server that runs MooncakeConnector.
    """

    engine_id: Text
    worker_addr: dict[str, dict[str, Text]] = {}
    kvxfer: KvxferPlace | None = None

    @classmethod
    def of(cls, engine_id: str, side_channels: Sequence[str], tp_size: int) -> BootstrapEntry:
        """Make the entry of an engine from the side channels of its ranks, or of rank 0 alone."""
        workers: dict[str, dict[str, str]] = {}
        for rank, address in enumerate(side_channels):
            workers.setdefault(str(rank % tp_size), {})[str(rank // tp_size)] = address
        return cls(engine_id, workers, KvxferPlace(side_channels[0]))


class EngineRegistration(Struct, frozen=True):
    """Message by which an engine makes its entry known to the server of its data parallel group."""

    dp_rank: Annotated[int, Meta(ge=0, lt=MAX_RANKS)]
    entry: BootstrapEntry


class WrongAnswerError(Exception):
    """The answer is none of a prefill server that runs kvxfer, or has no such engine."""


def engine_in(body: bytes, engine_id: str) -> tuple[str, str]:
    """Engine id and side channel of an engine in an answer.

    A router that has asked before the prefill server was started again knows an engine id of the past. It means the only
    engine, or the one of the same data parallel rank: vLLM ends engine ids with ``_dp<rank>`` where there are several.

    Raises:
        WrongAnswerError: the message says what is wrong.
    """
    try:
        entries = msgspec.json.decode(body, type=dict[str, BootstrapEntry])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WrongAnswerError(f"it does not answer as a bootstrap server: {error}") from error
    entry = _entry_of(entries, engine_id)
    if entry is None:
        raise WrongAnswerError("it knows no such engine")
    if entry.kvxfer is None:
        raise WrongAnswerError("the prefill server does not run kvxfer")
    try:
        addresses.parse(entry.kvxfer.address)
    except ConfigError as error:
        raise WrongAnswerError(f"the engine's side channel: {error}") from error
    return entry.engine_id, entry.kvxfer.address


def _entry_of(entries: Mapping[str, BootstrapEntry], engine_id: str) -> BootstrapEntry | None:
    for entry in entries.values():
        if entry.engine_id == engine_id:
            return entry
    if len(entries) == 1:
        return next(iter(entries.values()))
    _, marked, rank = engine_id.rpartition("_dp")
    return entries.get(rank) if marked else None
