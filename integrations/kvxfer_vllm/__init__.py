# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV connector on kvxfer.

vLLM finds it by the entry point (``{"kv_connector": "KvxferConnector", "kv_role": "kv_producer"}`` and nothing else) or by
``"kv_connector_module_path": "kvxfer_vllm"``. Importing this package imports neither torch nor vLLM nor a transfer engine,
because vLLM's plug-in loader imports it in every process, also in those that move no block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvxfer_vllm.connector import KvxferConnector

__all__ = ["KvxferConnector"]


def __getattr__(name: str) -> object:
    """Import the connector class when it is first used, with a version of vLLM that has what it imports."""
    if name == "KvxferConnector":
        from kvxfer_vllm import versions  # noqa: PLC0415 - see the module's docstring

        versions.check()
        from kvxfer_vllm.connector import KvxferConnector  # noqa: PLC0415 - see the module's docstring

        return KvxferConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
