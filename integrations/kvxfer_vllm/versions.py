# SPDX-License-Identifier: Apache-2.0
"""Differences between the versions of vLLM that the connector serves, and the check of the version at start-up.

Importing this module does not import the rest of the connector, whose imports fail with a vLLM that is too old.

Other differences need no code: hooks that an older vLLM does not call (`get_loaded_kv_cache_group_ids` and sources of hits before
0.32, `supports_sleep_mode`, `unregister_kv_caches` and `restore_kv_caches` before 0.33) are simply there.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Final

from kvxfer.errors import ConfigError

logger = logging.getLogger(f"vllm.{__name__}")

OLDEST: Final = (0, 31)
NEWEST: Final = (0, 33)
"""Range of versions that were tried. A newer one is served with a warning, an older one is refused."""


def check(version: str | None = None) -> None:
    """Check vLLM's version; a development version without a number is served.

    Args:
        version: by default that of the installed vLLM.

    Raises:
        ConfigError: it is older than `OLDEST`.
    """
    if version is None:
        import vllm  # noqa: PLC0415 - imports torch

        version = str(vllm.__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else NEWEST
    if number == (0, 0) or (number <= NEWEST and number >= OLDEST):
        return
    tried = f"vLLM {_text(OLDEST)} to {_text(NEWEST)}"
    if number < OLDEST:
        raise ConfigError(f"KvxferConnector does not support vLLM {version}, only {tried}; install one of these")
    logger.warning("kvxfer: vLLM %s is newer than the versions that were tried, %s.", version, tried)


def hit_source() -> Any:
    """Source of loaded tokens in vLLM's metrics; None before vLLM 0.32, which has no such metrics."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415 - since 0.32
    except ImportError:
        return None
    return CacheHitSource.P2P


def tells_of_sleep() -> bool:
    """Whether vLLM tells a connector when sleep mode takes the memory of the caches away, and gives it back: since 0.33."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1  # noqa: PLC0415 - imports torch

    return hasattr(KVConnectorBase_V1, "unregister_kv_caches")


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
