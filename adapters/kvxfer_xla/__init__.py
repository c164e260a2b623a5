# SPDX-License-Identifier: Apache-2.0
"""KV caches that are tensors of torch_xla."""

from __future__ import annotations

from kvxfer_xla.buffer import TURN, XlaBuffer

__all__ = ["TURN", "XlaBuffer"]
