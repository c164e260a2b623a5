# SPDX-License-Identifier: Apache-2.0
"""vLLM's MooncakeConnector for servers on a CPU (``kv_connector_module_path``): all that it lacks there is the number of a device."""

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import MooncakeConnector

__all__ = ["MooncakeConnector"]

torch.accelerator.current_device_index = lambda: 0
