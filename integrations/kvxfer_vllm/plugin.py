# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: registers the name ``KvxferConnector`` with vLLM."""

from __future__ import annotations

_NAME = "KvxferConnector"


def register() -> None:
    """Register the connector under its class name, unless it is registered. vLLM calls this once per process.

    The registered name equals the class name because vLLM's MultiConnector looks statistics up by the class name.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 - vLLM calls us

    if _NAME not in KVConnectorFactory._registry:  # noqa: SLF001 - vLLM has no public query, and registering twice raises
        KVConnectorFactory.register_connector(_NAME, "kvxfer_vllm", _NAME)
