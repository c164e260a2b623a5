# SPDX-License-Identifier: Apache-2.0
"""Names of transformers' continuous batching that this integration relies on, and the check of the version at start-up.

Nothing of transformers is replaced: its manager, scheduler and output router are subclassed, the schedulers are registered in
its own table, and its cache is used as it is.
"""

from __future__ import annotations

import re
from typing import Any, Final

from kvxfer.errors import ConfigError

TRIED: Final = ((5, 19),)
"""Versions of transformers that were tried. Continuous batching still changes with each, so others are refused."""

CLASSES: Final = {
    "ContinuousBatchingManager": (
        "_create_batch_processor",
        "_run_generation_loop",
        "add_request",
        "start",
        "is_running",
        "stop",
        "cancel_request",
        "register_result_handler",
    ),
    "OutputRouter": ("deliver", "deliver_batch", "fail_and_deliver"),
    "Scheduler": (
        "reset",
        "add_waiting_request",
        "has_pending_requests",
        "finish_request",
        "set_request_cancellation",
        "clear_cancelled_requests",
        "schedule_batch",
    ),
    "PagedAttentionCache": (
        "can_store_request_tokens",
        "free_blocks",
        "search_prefix_match",
        "mark_complete_blocks",
        "compute_free_capacity",
        "evict_cached_blocks",
    ),
    "RequestState": ("status", "to_generation_output"),
    "RequestStatus": ("PENDING", "PREFILLING", "FINISHED"),
}
"""Methods and class attributes, by class of ``transformers.generation.continuous_batching.continuous_api``."""

OBJECTS: Final = {
    "ContinuousBatchingManager": (
        "batch_processor",
        "background_thread_status",
        "continuous_batching_config",
        "distributed_helper",
        "generation_config",
        "model",
        "num_return_sequences",
        "output_router",
        "_wake_up_loop",
    ),
    "OutputRouter": ("result_handlers", "_lock"),
    "Scheduler": ("active_requests", "waiting_requests", "waiting_requests_order", "cache", "safety_margin"),
    "PagedAttentionCache": (
        "cache_allocators",
        "cache_tensor",
        "num_sectors",
        "num_blocks",
        "bytes_per_sector",
        "pool",
        "dtype",
        "device",
        "use_prefix_sharing",
    ),
    "CacheAllocator": (
        "block_table",
        "blocks_per_sector",
        "bytes_per_block",
        "head_dim",
        "layer_indices",
        "layer_type",
        "num_key_value_heads",
        "tokens_per_page",
    ),
}
"""Attributes of instances, by class."""


def check(version: str | None = None) -> None:
    """Check the version of transformers, and the names of its classes.

    Args:
        version: by default that of the installed transformers.

    Raises:
        ConfigError: it is none of `TRIED`, or lacks a name.
    """
    if version is None:
        import transformers  # noqa: PLC0415 - heavy

        version = str(transformers.__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) not in TRIED:
        tried = ", ".join(f"{major}.{minor}" for major, minor in TRIED)
        raise ConfigError(
            f"kvxfer_transformers does not support transformers {version}, whose continuous batching it does not know, only "
            f"{tried}; install one of these"
        )
    from transformers.generation.continuous_batching import continuous_api  # noqa: PLC0415 - the version is right

    for name, attributes in CLASSES.items():
        _require(getattr(continuous_api, name, None), name, attributes)


def check_made(made: Any, name: str) -> None:
    """Check the attributes of an object of transformers. Raises ConfigError: one is missing."""
    _require(made, name, OBJECTS[name])


def _require(owner: object, name: str, attributes: tuple[str, ...]) -> None:
    for attribute in attributes:
        if not hasattr(owner, attribute):
            raise ConfigError(
                f"kvxfer_transformers relies on {name}.{attribute}, which this transformers does not have"
            )
