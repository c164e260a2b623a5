# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: registers the name ``KvxferConnector`` with vLLM."""

from __future__ import annotations

import logging

_NAME = "KvxferConnector"


class _ToVllm(logging.Handler):
    """Hands messages to vLLM's logger, which vLLM may configure later, and again."""

    def emit(self, record: logging.LogRecord) -> None:
        vllm = logging.getLogger("vllm")
        if vllm.isEnabledFor(record.levelno):
            vllm.handle(record)


def register() -> None:
    """Register the connector under its class name, unless it is registered. vLLM calls this once per process.

    The registered name equals the class name because vLLM's MultiConnector looks statistics up by the class name. What kvxfer
    logs goes where vLLM's own messages go, with time and process, unless the program has configured kvxfer's logger itself.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 - vLLM calls us

    if _NAME not in KVConnectorFactory._registry:  # noqa: SLF001 - vLLM has no public query, and registering twice raises
        KVConnectorFactory.register_connector(_NAME, "kvxfer_vllm", _NAME)
    ours = logging.getLogger("kvxfer")
    if not ours.handlers:
        ours.addHandler(_ToVllm())
        ours.propagate = False
        if ours.level == logging.NOTSET:
            ours.setLevel(logging.INFO)  # else the root's level would hold, and vLLM's would not be asked
