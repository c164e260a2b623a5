# SPDX-License-Identifier: Apache-2.0
"""The connector under NixlConnector's names, for the checks that vLLM ties to the name and not to the class.

vLLM 0.32 compares the *string* ``kv_connector`` with ``"NixlConnector"`` in several places (the convolution state layout of
Mamba models on the CPU, the interleave of decode context parallelism, ...). A configuration written for NixlConnector keeps
them with one key more: ``"kv_connector_module_path": "kvxfer_vllm.nixl_shim"``.

The class keeps its own name, so inside MultiConnector, which looks statistics up by the class name, the plug-in must be
installed as well.
"""

from __future__ import annotations

from kvxfer_vllm.connector import KvxferConnector as NixlConnector
from kvxfer_vllm.connector import KvxferConnector as NixlPullConnector

__all__ = ["NixlConnector", "NixlPullConnector"]
