# SPDX-License-Identifier: Apache-2.0
"""NIXL, and its twins `nixl_rocm` and RIXL, as a transfer agent. Importing this imports no vendor module.

``python -m kvxfer_nixl`` says which module is used here and why, which backends start, and what to mind.
"""

from kvxfer_nixl._lane import Lane
from kvxfer_nixl.agent import NixlAgent

__all__ = ["Lane", "NixlAgent"]
