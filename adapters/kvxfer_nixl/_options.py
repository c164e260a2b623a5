# SPDX-License-Identifier: Apache-2.0
"""The options of `NixlAgent`, checked: a mistake is one ConfigError at the start, never a surprise later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvxfer.errors import ConfigError
from kvxfer_nixl._ucx import LOOPBACK_DEVICE, ucx_setting, with_ucx_setting

KNOWN = (
    "backends", "backend_options", "module", "progress_delay_us", "max_submit_nbytes", "drain_s", "loopback_only", "port_range",
)  # fmt: skip

UCX_OPTIONS = frozenset({
    "ucx_error_handling_mode", "num_workers", "num_threads", "split_batch_size", "device_list", "ucx_devices",
    "engine_config", "ucx_ep_close_force", "ucx_num_device_channels", "ucx_cq_db_mode",
})  # fmt: skip
"""What NIXL 1.5's UCX backend reads; it advertises only some of it, and ignores what it does not know."""

_LONGEST_DRAIN_S = 60
_LAST_PORT = 65_535


@dataclass(frozen=True)
class Options:
    """What `NixlAgent` was asked for: backends in order, each with its options.

    Attributes:
        loopback_only: no backend listens on an address that other machines reach.
    """

    backends: Mapping[str, Mapping[str, str]]
    progress_delay_us: int
    max_submit_nbytes: int | None
    drain_s: float
    loopback_only: bool

    @classmethod
    def checked(
        cls,
        *,
        backends: object,
        backend_options: object,
        progress_delay_us: object,
        max_submit_nbytes: object,
        drain_s: object,
        loopback_only: object,
        port_range: object,
        unknown: Mapping[str, object],
    ) -> Options:
        """From the arguments of `NixlAgent`, which may come from a user's JSON.

        Raises:
            ConfigError: naming the option and what would do.
        """
        if unknown:
            raise ConfigError(
                f"unknown option of the nixl agent: {', '.join(sorted(unknown))}; known are {', '.join(KNOWN)}"
            )
        if isinstance(backends, (str, bytes)) or not isinstance(backends, Sequence) or not backends:
            raise ConfigError(f'backends={backends!r} must be a list of backend names, such as ["UCX"]')
        if not all(isinstance(name, str) and name for name in backends) or len(set(backends)) != len(backends):
            raise ConfigError(f"backends={backends!r} must be names, each once")
        options = _checked_backend_options(backends, backend_options)
        delay = _checked_int("progress_delay_us", progress_delay_us, 1_000, 1_000_000)
        nbytes = None
        if max_submit_nbytes is not None:
            nbytes = _checked_int("max_submit_nbytes", max_submit_nbytes, 1 << 16, 1 << 40)
        if isinstance(drain_s, bool) or not isinstance(drain_s, (int, float)) or not 0 <= drain_s <= _LONGEST_DRAIN_S:
            raise ConfigError(f"drain_s={drain_s!r} must be a number of seconds from 0 to {_LONGEST_DRAIN_S}")
        if not isinstance(loopback_only, bool):
            raise ConfigError(f"loopback_only={loopback_only!r} must be true or false")
        if port_range is not None:
            ports = _checked_port_range(port_range)
            if "UCX" not in backends:
                raise ConfigError(f"port_range={ports} is for the backend UCX, which is not among {list(backends)}")
            given = ucx_setting(options["UCX"], "TCP_PORT_RANGE")
            if given not in (None, ports):
                raise ConfigError(
                    f"port_range={ports} contradicts UCX's TCP_PORT_RANGE={given} in the environment or in engine_config: "
                    "give one of them"
                )
            options["UCX"] = with_ucx_setting(options["UCX"], "TCP_PORT_RANGE", ports)
        confined = "UCX" in backends and _confine(options, loopback_only=loopback_only) and len(backends) == 1
        return cls({name: options.get(name, {}) for name in backends}, delay, nbytes, float(drain_s), confined)


def _confine(options: dict[str, dict[str, str]], *, loopback_only: bool) -> bool:
    """Let UCX use the loopback device only, if that is asked for and the operator did not name devices; True if it does."""
    ucx = options["UCX"]
    devices = ucx_setting(ucx, "NET_DEVICES") or ucx.get("device_list") or None
    if devices is None and loopback_only:
        devices = LOOPBACK_DEVICE
        options["UCX"] = with_ucx_setting(ucx, "NET_DEVICES", devices)
    return devices == LOOPBACK_DEVICE


def _checked_port_range(value: object) -> str:
    first, dash, last = value.partition("-") if isinstance(value, str) else ("", "", "")
    if not (dash and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) <= _LAST_PORT):
        raise ConfigError(
            f'port_range={value!r} must be two ports, the first not above the last, such as "40000-40099"'
        )
    return f"{int(first)}-{int(last)}"


def _checked_int(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be an integer from {low} to {high}")
    return value


def _checked_backend_options(backends: Sequence[str], given: object) -> dict[str, dict[str, str]]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"backend_options={given!r} must map the name of a backend to its options")
    options: dict[str, dict[str, str]] = {}
    for backend, pairs in given.items():
        if backend not in backends:
            raise ConfigError(f"backend_options names {backend!r}, which is not among backends={list(backends)}")
        if not isinstance(pairs, Mapping) or not all(isinstance(x, str) for pair in pairs.items() for x in pair):
            raise ConfigError(f"backend_options[{backend!r}]={pairs!r} must map strings to strings")
        options[backend] = dict(pairs)
    if "UCX" in backends:
        ucx = options.setdefault("UCX", {})
        strange = sorted(ucx.keys() - UCX_OPTIONS)
        if strange:
            raise ConfigError(
                f"NIXL's UCX backend has no option {', '.join(strange)}; it has {', '.join(sorted(UCX_OPTIONS))}"
            )
        mode = ucx.setdefault("ucx_error_handling_mode", "peer")
        if mode not in {"peer", "none"}:
            raise ConfigError(f"ucx_error_handling_mode={mode!r} must be 'peer' or 'none'")
    return options
