# SPDX-License-Identifier: Apache-2.0
"""The options of `NixlAgent`: one conversion, and a ConfigError that names the option and what is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from kvxfer.errors import ConfigError
from kvxfer_nixl._ucx import LOOPBACK_DEVICE, ucx_setting, with_ucx_setting

if TYPE_CHECKING:
    from collections.abc import Mapping

UCX_OPTIONS: Final = frozenset({
    "ucx_error_handling_mode", "num_workers", "num_threads", "split_batch_size", "device_list", "ucx_devices",
    "engine_config", "ucx_ep_close_force", "ucx_num_device_channels", "ucx_cq_db_mode",
})  # fmt: skip
"""Options that NIXL 1.5's UCX backend reads. It advertises only some of them, and ignores options that it does not know."""

ALLOWED: Final = {
    "backends": 'a list of names of backends, each once, such as ["UCX"]',
    "backend_options": "a mapping from names of backends to their options, which map strings to strings",
    "module": "a string",
    "progress_delay_us": "an integer from 1000 to 1000000",
    "max_submit_nbytes": "an integer from 65536 to 1099511627776, or null",
    "drain_s": "a number of seconds from 0 to 60",
    "loopback_only": "true or false",
    "port_range": 'two ports, the first not above the second, such as "40000-40099"',
}
_LAST_PORT: Final = 65_535

Name = Annotated[str, Meta(min_length=1)]


class NixlOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `NixlAgent`, which may come from a user's JSON."""

    backends: Annotated[list[Name], Meta(min_length=1)]
    backend_options: dict[Name, dict[str, str]]
    module: str | None
    progress_delay_us: Annotated[int, Meta(ge=1_000, le=1_000_000)]
    max_submit_nbytes: Annotated[int, Meta(ge=1 << 16, le=1 << 40)] | None
    drain_s: Annotated[float, Meta(ge=0, le=60)]
    loopback_only: bool
    port_range: Annotated[str, Meta(pattern=r"^[0-9]{1,5}-[0-9]{1,5}$")] | None

    @classmethod
    def of(cls, given: Mapping[str, object]) -> NixlOptions:
        """Convert and check the arguments.

        Raises:
            ConfigError: an argument is unknown, of a wrong type, out of range, or contradicts another one or the environment.
        """
        unknown = sorted(given.keys() - set(cls.__struct_fields__))
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise ConfigError(f"unknown option of the nixl agent: {', '.join(unknown)}; known are {known}")
        try:
            options = msgspec.convert(given, cls)
        except msgspec.ValidationError as error:
            name = (
                str(error).rpartition("`$.")[2].partition("`")[0].partition("[")[0]
            )  # "Expected ... - at `$.backends[0]`"
            raise _refused(name, given[name], str(error).removesuffix(f" - at `$.{name}`")) from error
        options.check()
        return options

    def check(self) -> None:
        """Check what no type says.

        Raises:
            ConfigError: options contradict each other or the environment, or UCX does not have one of its options.
        """
        if len(set(self.backends)) != len(self.backends):
            raise _refused("backends", self.backends, "a backend is named twice")
        strange = sorted(self.backend_options.keys() - set(self.backends))
        if strange:
            raise ConfigError(f"backend_options names {strange[0]!r}, which is not among backends={self.backends}")
        ucx = self.backend_options.get("UCX", {})
        strange = sorted(ucx.keys() - UCX_OPTIONS)
        if strange:
            known = ", ".join(sorted(UCX_OPTIONS))
            raise ConfigError(f"NIXL's UCX backend has no option {', '.join(strange)}; it has {known}")
        mode = ucx.get("ucx_error_handling_mode", "peer")
        if mode not in {"peer", "none"}:
            raise ConfigError(f"ucx_error_handling_mode={mode!r} must be 'peer' or 'none'")
        ports = self._ports
        if ports is None:
            return
        if "UCX" not in self.backends:
            raise ConfigError(f"port_range={ports} is for the backend UCX, which is not among {self.backends}")
        given = ucx_setting(ucx, "TCP_PORT_RANGE")
        if given not in (None, ports):
            raise ConfigError(
                f"port_range={ports} contradicts UCX's TCP_PORT_RANGE={given} in the environment or in engine_config: "
                "give one of them"
            )

    @property
    def _ports(self) -> str | None:
        """``port_range`` as UCX writes it."""
        if self.port_range is None:
            return None
        first, last = (int(port) for port in self.port_range.split("-"))
        if not 0 < first <= last <= _LAST_PORT:
            raise _refused("port_range", self.port_range)
        return f"{first}-{last}"

    def for_backends(self) -> tuple[dict[str, dict[str, str]], bool]:
        """The options that NIXL gets for each backend, and whether other machines reach none of the backends.

        UCX gets ``ucx_error_handling_mode=peer``, the range of ports, and the loopback device where ``loopback_only`` is set and
        the operator has named no devices.
        """
        options = {name: dict(self.backend_options.get(name, {})) for name in self.backends}
        if "UCX" not in options:
            return options, False
        ucx = {"ucx_error_handling_mode": "peer", **options["UCX"]}
        if self._ports is not None:
            ucx = with_ucx_setting(ucx, "TCP_PORT_RANGE", self._ports)
        devices = ucx_setting(ucx, "NET_DEVICES") or ucx.get("device_list") or None
        if devices is None and self.loopback_only:
            devices = LOOPBACK_DEVICE
            ucx = with_ucx_setting(ucx, "NET_DEVICES", devices)
        options["UCX"] = ucx
        return options, devices == LOOPBACK_DEVICE and len(options) == 1


def _refused(name: str, value: object, why: str = "") -> ConfigError:
    return ConfigError(f"{name}={value!r:.200} must be {ALLOWED[name]}{why and f' ({why})'}")
