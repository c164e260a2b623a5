# SPDX-License-Identifier: Apache-2.0
"""Settings of UCX that decide on which TCP ports it listens.

UCX carries out remote memory access over TCP by messages that the remote process applies without checking any key: a process
that connects to such a port can read and write all memory of the process that listens, and can end it (UCX 1.23). NIXL
exchanges no secret either. So no other than the fleet's own processes may reach the ports.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvxfer.agents.ports import Port

_log = logging.getLogger("kvxfer.nixl")

LOOPBACK_DEVICE = "lo"

_warned_of_ports = False


def ucx_setting(options: Mapping[str, str], name: str) -> str | None:
    """A setting of UCX as the operator gave it: the environment, which takes precedence in NIXL, else ``engine_config``."""
    given = os.environ.get(f"UCX_{name}")
    if given:
        return given
    pairs = (pair.partition("=") for pair in options.get("engine_config", "").split(","))
    return next((value for key, _, value in pairs if key.strip() == name), None)


def with_ucx_setting(options: Mapping[str, str], name: str, value: str) -> dict[str, str]:
    """Options of NIXL's UCX backend with one more setting of UCX."""
    config = options.get("engine_config", "")
    return {**options, "engine_config": f"{config},{name}={value}" if config else f"{name}={value}"}


def warn_of_open_ports(ports: Sequence[Port]) -> None:
    """Warn once in a process of what other machines can do through these ports."""
    global _warned_of_ports  # noqa: PLW0603 - once in a process
    reached = [str(port) for port in ports if not port.on_loopback]
    if not reached or _warned_of_ports:
        return
    _warned_of_ports = True
    _log.warning(
        "the transfer engine listens on %s, where it asks for no key and no secret: a process that can connect there can read and write "
        "all memory of this process, and can end it. Let only the servers of this fleet connect (a firewall and the option "
        "port_range, or a network of their own); see docs/security.md",
        ", ".join(reached),
    )
