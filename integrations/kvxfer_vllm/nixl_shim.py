# SPDX-License-Identifier: Apache-2.0
"""The connector under NixlConnector's names, for checks of vLLM that depend on the name.

vLLM 0.32 compares the *string* ``kv_connector`` with ``"NixlConnector"`` in several places (the convolution state layout of
Mamba models on the CPU, the interleave of decode context parallelism, ...). A configuration that was written for
NixlConnector keeps these with one more key: ``"kv_connector_module_path": "kvxfer_vllm.nixl_shim"``.

The class keeps its own name. MultiConnector looks statistics up by the class name, so there the plug-in must be installed, too.
"""

from __future__ import annotations

from kvxfer_vllm import KvxferConnector as NixlConnector
from kvxfer_vllm import KvxferConnector as NixlPullConnector
from kvxfer_vllm import KvxferConnector as NixlPushConnector

__all__ = ["NixlConnector", "NixlPullConnector", "NixlPushConnector"]
