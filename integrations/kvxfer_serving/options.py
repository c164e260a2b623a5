# SPDX-License-Identifier: Apache-2.0
"""``kv_connector_extra_config`` and the side channel's address. No vLLM, no I/O; wrong values end the server's start."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_type_hints

import msgspec
from msgspec import Meta, Struct

from kvxfer import addresses
from kvxfer.config import MAX_S, Settings
from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Options of NixlConnector with the same meaning here, by the name that they have here.
_RENAMED_FROM_NIXL = {"kv_lease_duration": "lease_seconds", "engine_ttl": "idle_peer_seconds"}

# Options of NixlConnector for which one value says what is the case here anyhow, and what to do instead of giving another.
_CONSTANT_FROM_NIXL = {
    "bidirectional_kv_xfer": (
        False,
        "give both servers kv_role kv_both, and send the decode request with do_remote_decode, too (docs/vllm.md, Several turns)",
    ),
    "enable_cross_layers_blocks": (False, "leave it out: caches are taken in any layout, and two servers may differ"),
    "enforce_handshake_compat": (
        True,
        "leave it out: versions of vLLM may differ, and caches that do not fit are never used (convert takes other dtypes)",
    ),
}

# Other options of NixlConnector that a configuration may bring along, and what to say instead here.
_REFUSED_FROM_NIXL = {
    "decoder_kv_blocks_ttl": "use lease_seconds on the decode server, with kv_role kv_both",
    "kv_recompute_threshold": "leave it out: a lease is read whatever its length",
    "push_registration_timeout": (
        "use rendezvous_timeout_seconds on the prefill server, and read_timeout_seconds on the decode server"
    ),
}
NIXL_OPTIONS: Final = frozenset(
    {"backends", "num_threads", *_RENAMED_FROM_NIXL, *_CONSTANT_FROM_NIXL, *_REFUSED_FROM_NIXL}
)
"""Options of NixlConnector in vLLM 0.31 to 0.33: each is taken with its meaning, or refused with what to write instead."""

# Options of MooncakeConnector, likewise.
_FROM_MOONCAKE = {
    "bootstrap_server_address": "use bootstrap_port; each prefill server answers for itself",
    "device_name": "use agent_options",
    "mooncake_protocol": "use agent, and agent_options",
    "num_workers": "transfers need no threads of their own",
    "prefill_side_swa_replay": "prefill leaves out what decode computes by itself",
}
_MOONCAKE = "MooncakeConnector"
_NIXL = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
_BOOTSTRAP_PORT = 8998
"""Default of VLLM_MOONCAKE_BOOTSTRAP_PORT."""

VARIABLES: Final = {
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "As ``KVXFER_SIDE_CHANNEL_HOST``, which comes before it.",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "As ``KVXFER_SIDE_CHANNEL_PORT``, which comes before it.",
    "VLLM_NIXL_ABORT_REQUEST_TIMEOUT": "As ``KVXFER_LEASE_S``, which comes before it: an older NixlConnector's time for which "
    "blocks wait for a decode server.",
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": "Default of ``bootstrap_port`` under the name ``MooncakeConnector``.",
    "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "With a ``bootstrap_port``: as ``KVXFER_LEASE_S``, which comes before it.",
}
"""Environment variables of NixlConnector and MooncakeConnector that count here, each with its meaning."""

_SIDE_CHANNEL_PORT = 5600

_MOST_PARTS = 8
"""Most parts of the layers: each part costs a message in each step of a prefill."""

String = Annotated[str, Meta(description="a string")]
Boolean = Annotated[bool, Meta(description="true or false")]
Port = Annotated[int, Meta(ge=1, le=2**16 - 1, description="a port from 1 to 65535")]
Seconds = Annotated[float, Meta(gt=0, le=MAX_S, description=f"a number of seconds above 0 and up to {MAX_S:.0f}")]


class ConnectorOptions(Struct, frozen=True, kw_only=True):
    """Options of the connector. None leaves ``KVXFER_*`` variables and kvxfer's defaults in force."""

    agent: String = "nixl"
    """Name of the transfer engine's adapter; ``kvxfer agents`` lists the installed ones."""
    backends: Annotated[tuple[str, ...], Meta(description="a list of strings")] = ()
    """Backends of NIXL; by default its adapter's, ``["UCX"]``."""
    agent_options: Annotated[dict[str, Any], Meta(description="an object")] = {}
    """Further options of the adapter, see below."""
    mode: Annotated[Literal["auto", "push", "pull"], Meta(description="one of auto, push, pull")] = "auto"
    """``"auto"`` serves each request as it is sent: to one server after the other, or to both at once; then its blocks leave
    while prefill runs. ``"push"`` means the same. ``"pull"`` serves the first kind only."""
    granularity: Annotated[Literal["chunk", "layer"], Meta(description="one of chunk, layer")] = "chunk"
    """Unit of publishing while prefill runs: ``"chunk"``, the blocks that one engine step completes; ``"layer"``, an
    eighth of the layers of these blocks after the other, while the step runs. To be set on both servers: a decode server with
    ``"chunk"`` reads blocks that all layers have filled. Refused with full CUDA graphs and micro-batches, which call no hook for
    each layer."""
    lease_seconds: Seconds | None = None
    """Producer: time that finished blocks wait for a consumer that does not renew the lease."""
    announce_timeout_seconds: Seconds | None = None
    """Producer: longest prefill, from the arrival of the request."""
    rendezvous_timeout_seconds: Seconds | None = None
    """Producer: time that a decode request which arrives first waits for its prefill request."""
    read_timeout_seconds: Seconds | None = None
    """Consumer: longest read, from its start to its end; a request that is sent to both servers at once has the two times above
    in addition."""
    peer_timeout_seconds: Seconds | None = None
    """Consumer: longest silence of a peer that a read waits for."""
    unread_lease_seconds: Seconds | None = None
    """Consumer: longest time that a waiting request renews its lease."""
    idle_peer_seconds: Seconds | None = None
    """Time without a request to a server after which it is forgotten; it is met again when it is needed."""
    secret_file: String | None = None
    """File with the secret of all servers, which authenticates and encrypts the side channel; by default that of
    ``KVXFER_SECRET_FILE``, else the text in ``KVXFER_SECRET``."""
    allow_unauthenticated: Boolean | None = None
    """Whether a side channel that other machines reach may do without a secret; by default it may if
    ``KVXFER_ALLOW_UNAUTHENTICATED`` is 1."""
    verify: Boolean = False
    """Whether a decode server compares what arrived with what the prefill server has, before it uses it."""
    convert: Boolean = False
    """Consumer: whether the elements of a producer whose caches have another dtype, or other scales, are converted; else it is
    refused."""
    model_fingerprint: String = ""
    """Replaces the fingerprint that is made of the model's checkpoint and configuration, except for the dtype. To be equal on servers
    whose models are equal and look different, such as two formats of one checkpoint."""

    bootstrap_port: Port | None = None
    """Producer: port of ``GET /query``, which MooncakeConnector's routers ask (`kvxfer_vllm.bootstrap`); without it none. Set on
    both servers it also means that the side channel's default is any free port, and that
    ``VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT`` counts."""
    nixl_metrics: Boolean | None = None
    """Whether ``/metrics`` has NixlConnector's names (``vllm:nixl_*``), too, for dashboards that were made for it; by default under
    the name ``NixlConnector``."""

    @classmethod
    def parse(
        cls, extra: Mapping[str, Any], *, connector: str = "", environ: Mapping[str, str] | None = None
    ) -> ConnectorOptions:
        """Check vLLM's ``kv_connector_extra_config`` and make options of it.

        Args:
            extra: the configuration.
            connector: name under which this connector was chosen; that of MooncakeConnector has a ``bootstrap_port`` by default.
            environ: has the default of that port.

        Raises:
            ConfigError: an option is unknown, of a wrong type or out of range. The message names the option and what is
                allowed.
        """
        given = _without_nixl_names(extra)
        for name in given:
            if name in _FROM_MOONCAKE:
                raise _error(f"{name!r} is MooncakeConnector's option: {_FROM_MOONCAKE[name]}")
            if name not in _TYPES:
                raise _error(f"unknown option {name!r}; known are {', '.join(sorted(_TYPES))}")
        values = {name: _checked(name, value) for name, value in given.items()}
        if connector == _MOONCAKE and values.get("bootstrap_port") is None:
            values["bootstrap_port"] = _port_of(environ or {}, "VLLM_MOONCAKE_BOOTSTRAP_PORT", 1) or _BOOTSTRAP_PORT
        if connector in _NIXL and values.get("nixl_metrics") is None:
            values["nixl_metrics"] = True
        options = cls(**values)
        if options.granularity == "layer" and options.mode == "pull":
            raise _error("granularity 'layer' is for mode 'auto' or 'push', not 'pull'")
        return options

    def parts(self, layer_names: Sequence[str]) -> list[list[str]]:
        """Divide layers into parts that are published one after the other: neighbours, all parts of nearly equal size."""
        number = min(len(layer_names), _MOST_PARTS) if self.granularity == "layer" else 1
        bounds = [len(layer_names) * i // number for i in range(number + 1)]
        return [list(layer_names[start:stop]) for start, stop in pairwise(bounds)]

    def for_agent(self) -> dict[str, Any]:
        """Options of the adapter, with ``backends`` if it was given."""
        return self.agent_options | ({"backends": list(self.backends)} if self.backends else {})

    def for_endpoint(self, environ: Mapping[str, str]) -> Settings:
        """Settings of the endpoint: these options before ``KVXFER_*`` variables before kvxfer's defaults.

        NixlConnector's variable, and with a ``bootstrap_port`` MooncakeConnector's, come before the default of ``lease_s``.

        Raises:
            ConfigError: the value of a variable has the wrong type or is out of range.
        """
        mooncake = ("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT",) if self.bootstrap_port is not None else ()
        for name in (*mooncake, "VLLM_NIXL_ABORT_REQUEST_TIMEOUT"):
            if environ.get(name):
                if not environ[name].isdecimal() or not 0 < int(environ[name]) <= MAX_S:
                    raise ConfigError(f"{name} must be a whole number of seconds above 0, not {environ[name]!r}")
                environ = {**environ, "KVXFER_LEASE_S": environ.get("KVXFER_LEASE_S") or environ[name]}
        return Settings.resolve(
            environ=environ,
            lease_s=self.lease_seconds,
            announce_timeout_s=self.announce_timeout_seconds,
            rendezvous_timeout_s=self.rendezvous_timeout_seconds,
            read_timeout_s=self.read_timeout_seconds,
            peer_timeout_s=self.peer_timeout_seconds,
            unread_lease_s=self.unread_lease_seconds,
            idle_peer_s=self.idle_peer_seconds,
        )

    def side_channel(self, environ: Mapping[str, str], data_parallel_index: int) -> tuple[str, int]:
        """See `side_channel`. With a ``bootstrap_port`` peers ask for the port, so the default is any free one."""
        port = _SIDE_CHANNEL_PORT if self.bootstrap_port is None else 0
        return side_channel(environ, data_parallel_index, port)


_TYPES: Final = get_type_hints(ConnectorOptions, include_extras=True)


def _without_nixl_names(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NixlConnector's options by what they mean here.

    Raises:
        ConfigError: such an option has no meaning here, or contradicts another one; the message says what to write instead.
    """
    given: dict[str, Any] = {}
    for name, value in extra.items():
        if name in _REFUSED_FROM_NIXL:
            raise _error(f"{name!r} is NixlConnector's option: {_REFUSED_FROM_NIXL[name]}")
        if name in _CONSTANT_FROM_NIXL:
            only, instead = _CONSTANT_FROM_NIXL[name]
            if value is not only:
                raise _error(f"{name!r} is NixlConnector's option, and can only be {str(only).lower()} here: {instead}")
        elif name in _RENAMED_FROM_NIXL:
            ours = _RENAMED_FROM_NIXL[name]
            given[ours] = _checked(ours, value, name)
            if extra.get(ours, value) != value:
                raise _error(f"{name!r} is NixlConnector's name of {ours!r}: give one of them")
        elif name != "num_threads":
            given[name] = value
    if "num_threads" in extra:
        given["agent_options"] = _with_threads(extra)
    return given


def _with_threads(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the adapter, with NixlConnector's ``num_threads`` where NixlConnector hands it on to: UCX."""
    number = extra["num_threads"]
    options: dict[str, Any] = _checked("agent_options", extra.get("agent_options", {}))
    if type(number) is not int or number < 0:
        raise _error(f"num_threads must be a whole number from 0, not {number!r}")
    if extra.get("agent", "nixl") != "nixl" or "UCX" not in (
        _checked("backends", extra.get("backends", [])) or ["UCX"]
    ):
        raise _error("num_threads is for NIXL's backend UCX: use agent_options for another one")
    backends = options.get("backend_options", {})
    ucx = backends.get("UCX", {}) if isinstance(backends, dict) else None
    if not isinstance(ucx, dict):
        return options  # the adapter says what is wrong
    if ucx.get("num_threads", str(number)) != str(number):
        raise _error(
            "num_threads is NixlConnector's name of agent_options.backend_options.UCX.num_threads: give one of them"
        )
    return {**options, "backend_options": {**backends, "UCX": {**ucx, "num_threads": str(number)}}}


def _checked(option: str, value: object, name: str = "") -> Any:
    """Convert an option's value to its type, or say what is allowed, under the name by which it was given."""
    try:
        return msgspec.convert(value, _TYPES[option])
    except msgspec.ValidationError:
        raise _error(f"{name or option} must be {allowed(option)}, not {value!r}") from None


def allowed(option: str) -> str:
    """Values of an option, in words: the description of its type, or of the alternative that has one."""
    kind = _TYPES[option]
    alternatives = getattr(kind, "__args__", ()) if not hasattr(kind, "__metadata__") else ()
    (described,) = [each for each in (kind, *alternatives) if hasattr(each, "__metadata__")]
    return str(described.__metadata__[0].description)


def _error(reason: str) -> ConfigError:
    return ConfigError(f"kv_connector_extra_config: {reason}")


def side_channel(
    environ: Mapping[str, str], data_parallel_index: int, port: int = _SIDE_CHANNEL_PORT
) -> tuple[str, int]:
    """Host and port of rank 0: ``KVXFER_SIDE_CHANNEL_*``, else NixlConnector's variables, else localhost and ``port``.

    The data parallel index is added to the port, as NixlConnector does; port 0 takes any free port.

    Raises:
        ConfigError: a port is not a number from 0 to 65535, or a host is not one.
    """
    host = "localhost"
    for name in ("VLLM_NIXL_SIDE_CHANNEL", "KVXFER_SIDE_CHANNEL"):
        given = environ.get(f"{name}_HOST")
        if given:
            host = given if given == addresses.ANY else addresses.checked_host(given, f"{name}_HOST={given}")
        given_port = _port_of(environ, f"{name}_PORT", 0)
        port = port if given_port is None else given_port
    port = port + data_parallel_index if port else 0
    if port > 2**16 - 1:
        raise ConfigError(f"the side channel's port plus the data parallel index is {port}, beyond 65535")
    return host, port


def _port_of(environ: Mapping[str, str], name: str, least: int) -> int | None:
    """Value of a variable that is a port; None if it is not set."""
    text = environ.get(name) or ""
    if not text:
        return None
    if not text.isdecimal() or not least <= int(text) < 2**16:
        raise ConfigError(f"{name} must be a number from {least} to 65535, not {text!r}")
    return int(text)


def tcp_address(host: str, port: int) -> str:
    """Address of a control channel; an IPv6 host gets its brackets."""
    return addresses.join(host, port)


def advertised(host: str) -> str:
    """Host that peers are told: an address of this machine for "all interfaces", a number for ``localhost``, else the host."""
    return addresses.advertised_host(host)
