# SPDX-License-Identifier: Apache-2.0
"""The connector under MooncakeConnector's name, for what selects by name, with the port that MooncakeConnector's routers ask.

``"kv_connector": "MooncakeConnector", "kv_connector_module_path": "kvxfer_vllm.mooncake_shim"``. The name sets ``bootstrap_port`` to
``VLLM_MOONCAKE_BOOTSTRAP_PORT`` (8998), see `kvxfer_serving.options`. As in `kvxfer_vllm.nixl_shim` the class keeps its own name.
"""

from __future__ import annotations

from kvxfer_vllm import KvxferConnector as MooncakeConnector

__all__ = ["MooncakeConnector"]
