# SPDX-License-Identifier: Apache-2.0
"""NIXL, and its twins `nixl_rocm` and RIXL, as a transfer agent. Importing this imports no vendor module.

``kvxfer doctor`` tells which module is used here and why, which backends start, and what to watch for.
"""

from kvxfer_nixl._link import Link
from kvxfer_nixl.agent import NixlAgent

__all__ = ["Link", "NixlAgent"]
