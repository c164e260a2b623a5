# SPDX-License-Identifier: Apache-2.0
"""PyTorch, or None: these adapters can be asked for what they lack where it is not installed."""

from __future__ import annotations

from typing import Any

torch: Any
try:
    import torch as _torch
except ImportError:
    torch = None
else:
    torch = _torch


def why_unavailable(build: str, what: str, tool: str) -> str | None:
    """None if PyTorch finds a GPU of this kind here, else why not.

    Args:
        build: what ``torch.version`` calls the kind.
        what: its name.
        tool: what shows the GPUs of a machine.
    """
    if torch is None:
        return f"PyTorch is not installed: install torch for {what}"
    if getattr(torch.version, build, None) is None:
        return f"this PyTorch was built without {what}: install torch for {what}"
    return None if torch.cuda.is_available() else f"PyTorch finds no GPU for {what} here ({tool})"
