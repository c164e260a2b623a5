# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine as a transfer agent. Importing this imports no vendor module."""

from kvxfer_mooncake.agent import MooncakeAgent

__all__ = ["MooncakeAgent"]
