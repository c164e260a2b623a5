# SPDX-License-Identifier: Apache-2.0
"""Continuous batching of Hugging Face transformers on kvxfer: an engine that prefills for others and decodes for others.

`KvxferBatchingManager` takes the place of transformers' ``ContinuousBatchingManager``. Importing this package imports neither
torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvxfer_transformers.batching import KvxferBatchingManager

__all__ = ["KvxferBatchingManager"]


def __getattr__(name: str) -> object:
    """Import the class when it is first used, with a version of transformers that has what it relies on."""
    if name == "KvxferBatchingManager":
        from kvxfer_transformers import seams  # noqa: PLC0415 - see the module's docstring

        seams.check()
        from kvxfer_transformers.batching import KvxferBatchingManager  # noqa: PLC0415 - see the module's docstring

        return KvxferBatchingManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
