# SPDX-License-Identifier: Apache-2.0
"""KV caches that are jax.Arrays: on TPUs, and on whatever else JAX computes."""

from __future__ import annotations

from kvxfer_jax.arrays import Arrays, Share
from kvxfer_jax.buffer import JaxBuffer

__all__ = ["Arrays", "JaxBuffer", "Share"]
