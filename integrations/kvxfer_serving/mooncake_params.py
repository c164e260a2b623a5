# SPDX-License-Identifier: Apache-2.0
"""MooncakeConnector's parameters of a request, which name an HTTP address that knows the prefill server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvxfer import addresses
from kvxfer.errors import ConfigError
from kvxfer_serving.key_checks import check_keys, check_transfer_id
from kvxfer_serving.options import tcp_address
from kvxfer_serving.refusals import RefusalReason, RefusedParams

if TYPE_CHECKING:
    from collections.abc import Mapping

_OF_MOONCAKE: dict[str, type] = {"remote_bootstrap_addr": str, "remote_engine_id": str, "transfer_id": str}
"""MooncakeConnector's keys on the decode side."""


@dataclass(frozen=True)
class BootstrapRequest:
    """A request whose prefill server must be asked for at an HTTP address, as MooncakeConnector's routers send it.

    Attributes:
        url: ``http://host:port`` of the server to ask.
        engine_id: of the prefill server, as the router learned it, maybe from a process that has ended.
    """

    url: str
    engine_id: str


def bootstrap_request(params: Mapping[str, Any], *, push: bool) -> BootstrapRequest | RefusedParams:
    """Read MooncakeConnector's parameters; ``push``: requests may be sent to both servers at once."""
    if not push:
        return RefusedParams(RefusalReason.OTHER_MODE, "MooncakeConnector's keys are not for mode 'pull'")
    wrong = check_keys(params, _OF_MOONCAKE) or check_transfer_id(params)
    if wrong is not None:
        return wrong
    scheme, _, place = params["remote_bootstrap_addr"].removesuffix("/").partition("://")
    try:
        host, port = addresses.parse(f"tcp://{place}")
    except ConfigError:
        scheme = ""
    if scheme != "http":
        return RefusedParams(RefusalReason.BAD_TYPE, "remote_bootstrap_addr is not http://host:port")
    url = tcp_address(host, port).replace("tcp://", "http://")
    return BootstrapRequest(url, params["remote_engine_id"])


def named_by_bootstrap(params: Mapping[str, Any], engine_id: str, address: str) -> dict[str, Any]:
    """Replace MooncakeConnector's keys by NixlConnector's, for `kvxfer_serving.transfer_params.parse`, now that the prefill server is known.

    Args:
        params: of the request.
        engine_id: of the prefill server that runs now.
        address: of its side channel.
    """
    host, port = addresses.parse(address)
    place = {"remote_engine_id": engine_id, "remote_host": host, "remote_port": port}
    return {name: value for name, value in params.items() if name != "remote_bootstrap_addr"} | place
