# SPDX-License-Identifier: Apache-2.0
"""vLLM's planning of the cache, which moved to another module, and was divided in two, with vLLM 0.33."""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:
    from vllm.v1.core import kv_cache_utils as planning

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

get_kv_cache_groups = planning.get_kv_cache_groups
get_kv_cache_config_from_groups = planning.get_kv_cache_config_from_groups


def get_kv_cache_configs(
    config: VllmConfig, specs: list[dict[str, KVCacheSpec]], memory: list[int]
) -> list[KVCacheConfig]:
    """Make the configurations of the workers' caches from the specs and the memory of each."""
    if not hasattr(planning, "get_global_kv_cache_groups"):
        return planning.get_kv_cache_configs(config, specs, memory)
    return planning.get_kv_cache_configs(config, specs, memory, planning.get_global_kv_cache_groups(config, specs))
