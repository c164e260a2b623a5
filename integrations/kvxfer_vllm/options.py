# SPDX-License-Identifier: Apache-2.0
"""``kv_connector_extra_config`` and the side channel's address. Pure; wrong values stop the server at start-up, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from kvxfer import addresses
from kvxfer.config import Settings
from kvxfer.errors import ConfigError

# NixlConnector's options that a configuration may bring along, and what to say instead here.
_FROM_NIXL = {
    "bidirectional_kv_xfer": "transfers back to the prefill server are not supported",
    "decoder_kv_blocks_ttl": "transfers back to the prefill server are not supported",
    "enforce_handshake_compat": "caches are compared when two servers meet, whatever their versions",
    "engine_ttl": "peers are forgotten and met again without a setting",
    "kv_lease_duration": "use lease_seconds",
    "kv_recompute_threshold": "transfers back to the prefill server are not supported",
    "num_threads": "use agent_options",
    "push_registration_timeout": "use match_seconds",
}

_MODES = ("auto", "push", "pull")
_GRANULARITIES = ("chunk", "layer")
_MOST_PARTS = 8
"""Into which layers are split: each part costs a message in each step that computes some of a prefill."""
_SECONDS = (
    "lease_seconds",
    "announce_seconds",
    "match_seconds",
    "read_timeout_seconds",
    "peer_timeout_seconds",
    "hold_seconds",
)


@dataclass(frozen=True)
class ConnectorOptions:
    """The known options. Times are in seconds; None leaves ``KVXFER_*`` variables and kvxfer's defaults in force.

    Attributes:
        agent: name of the transfer engine's adapter.
        backends: passed to the adapter as its option of that name, e.g. ``["UCX"]``.
        agent_options: further options of the adapter.
        mode: ``"auto"`` takes each request as it comes: sent to one server after the other, or to both at once, and then its
            blocks leave while prefill runs. ``"push"`` means the same. ``"pull"`` knows the first way only.
        granularity: how much is complete at a time while prefill runs: ``"chunk"``, what one engine step computes; or
            ``"layer"``, and of that an eighth of the layers after the other while the step runs. To be set on both servers:
            a decode server that is not told reads as with ``"chunk"``.
        lease_seconds: producer: how long finished blocks wait for a consumer that does not renew.
        announce_seconds: producer: how long prefill may take, from the arrival of the request on.
        match_seconds: producer: how long a decode server that comes first is kept a place.
        read_timeout_seconds: consumer: longest time from the start of a read to its end, of whatever kind.
        peer_timeout_seconds: consumer: how long a silent peer is waited for.
        hold_seconds: consumer: how long a waiting request renews its lease.
        secret_file: holds the secret of all servers of a fleet, see `kvxfer.Secret`; by default the environment says.
        verify: compare what arrived with what the prefill server has, before it is used.
        allow_unauthenticated: a side channel that other machines reach may do without.
        model_fingerprint: replaces what is derived from the model's name and configuration; equal on servers that load
            the same weights from different paths.
    """

    agent: str = "nixl"
    backends: tuple[str, ...] = ()
    agent_options: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "auto"
    granularity: str = "chunk"
    lease_seconds: float | None = None
    announce_seconds: float | None = None
    match_seconds: float | None = None
    read_timeout_seconds: float | None = None
    peer_timeout_seconds: float | None = None
    hold_seconds: float | None = None
    secret_file: str | None = None
    allow_unauthenticated: bool | None = None
    verify: bool = False
    model_fingerprint: str = ""

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> ConnectorOptions:
        """Options from vLLM's ``kv_connector_extra_config``.

        Raises:
            ConfigError: an option is unknown, or its value cannot be; the message lists the known ones.
        """
        known = sorted(f.name for f in fields(cls))
        for name in extra:
            if name in _FROM_NIXL:
                raise ConfigError(f"kv_connector_extra_config: {name!r} is NixlConnector's option: {_FROM_NIXL[name]}")
            if name not in known:
                raise ConfigError(f"kv_connector_extra_config: unknown option {name!r}; known are {', '.join(known)}")
        values = dict(extra)
        for name, absent in (("allow_unauthenticated", None), ("verify", False)):
            value = values.get(name, absent)
            if value is not absent and not isinstance(value, bool):
                raise ConfigError(f"kv_connector_extra_config: {name} must be true or false")
        for name in ("agent", "mode", "granularity", "model_fingerprint", "secret_file"):
            if not isinstance(values.get(name, ""), str):
                raise ConfigError(f"kv_connector_extra_config: {name} must be a string, not {values[name]!r}")
        if values.get("mode", "auto") not in _MODES:
            raise ConfigError(
                f"kv_connector_extra_config: mode {values['mode']!r} is unknown; known are {', '.join(_MODES)}"
            )
        granularity = values.get("granularity", "chunk")
        if granularity not in _GRANULARITIES:
            raise ConfigError(
                f"kv_connector_extra_config: granularity {granularity!r} is unknown; known are {', '.join(_GRANULARITIES)}"
            )
        if granularity == "layer" and values.get("mode") == "pull":
            raise ConfigError("kv_connector_extra_config: granularity 'layer' is for mode 'auto' or 'push', not 'pull'")
        backends = values.get("backends", ())
        if not isinstance(backends, (list, tuple)) or not all(isinstance(name, str) for name in backends):
            raise ConfigError(f"kv_connector_extra_config: backends must be a list of strings, not {backends!r}")
        values["backends"] = tuple(backends)
        if not isinstance(values.get("agent_options", {}), Mapping):
            raise ConfigError("kv_connector_extra_config: agent_options must be an object")
        for name in _SECONDS:
            seconds = values.get(name)
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            if seconds is not None and not (number and math.isfinite(seconds) and seconds > 0):
                raise ConfigError(f"kv_connector_extra_config: {name} must be a positive number, not {seconds!r}")
        return cls(**values)

    def parts(self, layer_names: Sequence[str]) -> list[list[str]]:
        """Layers as they become complete together: neighbours, all parts of nearly equal size."""
        number = min(len(layer_names), _MOST_PARTS) if self.granularity == "layer" else 1
        bounds = [len(layer_names) * i // number for i in range(number + 1)]
        return [list(layer_names[start:stop]) for start, stop in pairwise(bounds)]

    def for_agent(self) -> dict[str, Any]:
        """Options of the adapter, ``backends`` among them where it was given."""
        return dict(self.agent_options) | ({"backends": list(self.backends)} if self.backends else {})

    def for_endpoint(self, environ: Mapping[str, str]) -> Settings:
        """The endpoint's settings: these options before ``KVXFER_*`` variables before kvxfer's defaults.

        Raises:
            ConfigError: a variable's value cannot be.
        """
        return Settings.resolve(
            environ=environ,
            lease_s=self.lease_seconds,
            announce_timeout_s=self.announce_seconds,
            rendezvous_timeout_s=self.match_seconds,
            read_timeout_s=self.read_timeout_seconds,
            peer_timeout_s=self.peer_timeout_seconds,
            unread_lease_s=self.hold_seconds,
        )


def side_channel(environ: Mapping[str, str], data_parallel_index: int) -> tuple[str, int]:
    """Host and port of rank 0: ``KVXFER_SIDE_CHANNEL_*``, else NixlConnector's variables, else localhost:5600.

    The data parallel index is added to the port, as NixlConnector does; port 0 takes any free port.

    Raises:
        ConfigError: a port is no number from 0 to 65535, or a host is none.
    """
    host, port = "localhost", 5600
    for name in ("VLLM_NIXL_SIDE_CHANNEL", "KVXFER_SIDE_CHANNEL"):
        given = environ.get(f"{name}_HOST")
        if given:
            host = given if given == addresses.ANY else addresses.checked_host(given, f"{name}_HOST={given}")
        text = environ.get(f"{name}_PORT") or ""
        if text:
            if not text.isdecimal() or int(text) > 2**16 - 1:
                raise ConfigError(f"{name}_PORT must be a number from 0 to 65535, not {text!r}")
            port = int(text)
    port = port + data_parallel_index if port else 0
    if port > 2**16 - 1:
        raise ConfigError(f"the side channel's port plus the data parallel index is {port}, beyond 65535")
    return host, port


def tcp_address(host: str, port: int) -> str:
    """A control address; an IPv6 host gets the brackets that it needs there."""
    return addresses.join(host, port)


def advertised(host: str) -> str:
    """The host that others are told: this machine's address for "all interfaces", a number for ``localhost``, else what is given."""
    return addresses.advertised_host(host)
