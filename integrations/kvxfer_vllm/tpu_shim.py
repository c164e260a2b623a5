# SPDX-License-Identifier: Apache-2.0
"""The connector under the name ``TPUConnector``: the platform of tpu-inference refuses any other one for prefill and decode.

It compares the *string* ``kv_connector`` (``TpuPlatform.check_and_update_config``, tpu-inference 0021b4a), and vLLM takes the
class from ``"kv_connector_module_path": "kvxfer_vllm.tpu_shim"``.
"""

from __future__ import annotations

from kvxfer_vllm.connector import KvxferConnector as TPUConnector

__all__ = ["TPUConnector"]
