# SPDX-License-Identifier: Apache-2.0
r"""``python -m kvxfer_vllm.router_registration``: register servers with a vllm-router while they are healthy.

vllm-router sends a request to both servers at once only if they register with it, every few seconds, at its
``--vllm-discovery-address``. Of vLLM's connectors only MoRIIOConnector does that, from inside the server. This command does it
from outside: it opens no port, and does not register a server that does not answer ``/health``, so the router soon stops
sending it requests.

    vllm-router --vllm-pd-disaggregation --kv-connector moriio --vllm-discovery-address 127.0.0.1:30001
    python -m kvxfer_vllm.router_registration --router 127.0.0.1:30001 \
        --prefill http://127.0.0.1:8100 prefill-0@127.0.0.1:5600 --decode http://127.0.0.1:8200

``--prefill`` takes the server's URL, and the engine id (``"engine_id":"prefill-0"`` in ``--kv-transfer-config``) and side channel
(``KVXFER_SIDE_CHANNEL_HOST`` and ``_PORT``) by which decode servers find it.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING

import msgspec
import zmq

if TYPE_CHECKING:
    from collections.abc import Sequence

# The router forgets a server five seconds after its last registration.
_EVERY_S = 1.0
_HEALTH_S = 3.0
_HTTP = re.compile(r"http://([^/\s]+:[0-9]{1,5})/?")
# Characters of an HTTP header, with a host and a port at the end.
_PLACE = re.compile(r"[!-~]+@[!-~]+:[0-9]{1,5}")


class RouterRegistration(msgspec.Struct, frozen=True):
    """Registration of one server, as vllm-router reads it.

    Attributes:
        type: ``"P"`` for prefill or ``"D"`` for decode.
        http_address: ``host:port`` of its API.
        zmq_address: of a prefill server, ``engine-id@host:port``, which the router puts into the id of each request.
        transfer_mode: ``"WRITE"`` means that a request goes to both servers at once.
    """

    type: str
    http_address: str
    zmq_address: str = "-"
    transfer_mode: str = "WRITE"

    def healthy(self) -> bool:
        """Whether the server answers ``/health``."""
        connection = HTTPConnection(self.http_address, timeout=_HEALTH_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


def register(router: str, server: RouterRegistration) -> None:
    """Register a server with a router (``host:port``) again and again while it is healthy; does not return."""
    was_healthy = False
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # do not queue for a router that is away
        socket.connect(f"tcp://{router}")
        while True:
            healthy = server.healthy()
            if healthy != was_healthy:
                was_healthy = healthy
                sys.stdout.write(f"{server.http_address} is {'healthy' if healthy else 'not healthy'}\n")
                sys.stdout.flush()
            if healthy:
                with contextlib.suppress(zmq.Again):
                    socket.send(msgspec.msgpack.encode(server), zmq.NOBLOCK)
            time.sleep(_EVERY_S)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m kvxfer_vllm.router_registration",
        description="Register servers that run KvxferConnector with a vllm-router that sends each request to both at once.",
    )
    parser.add_argument("--router", required=True, metavar="HOST:PORT", help="its --vllm-discovery-address")
    parser.add_argument(
        "--prefill",
        nargs=2,
        action="append",
        default=[],
        metavar=("URL", "ENGINE_ID@HOST:PORT"),
        help="a prefill server, its engine id and side channel",
    )
    parser.add_argument("--decode", action="append", default=[], metavar="URL", help="a decode server")
    options = parser.parse_args(arguments)
    servers = []
    for kind, url, place in [("P", *named) for named in options.prefill] + [("D", url, "-") for url in options.decode]:
        found = _HTTP.fullmatch(url)
        if found is None:
            parser.error(f"{url!r} is not like http://host:port")
        if kind == "P" and not _PLACE.fullmatch(place):
            parser.error(f"{place!r} is not like engine-id@host:port")
        servers.append(RouterRegistration(kind, found.group(1), place))
    if not servers:
        parser.error("name a server: --prefill or --decode")
    threads = [threading.Thread(target=register, args=(options.router, server), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    with contextlib.suppress(KeyboardInterrupt):
        threads[0].join()


if __name__ == "__main__":
    main()
