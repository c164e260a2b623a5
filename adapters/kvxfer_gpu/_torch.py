# SPDX-License-Identifier: Apache-2.0
"""PyTorch, or None where it is not installed: these adapters then still say what they lack."""

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
    """Reason why PyTorch finds no GPU of this kind here; None if it finds one.

    Args:
        build: name of the kind in ``torch.version``.
        what: its name for people.
        tool: command that shows the GPUs of a machine.
    """
    if torch is None:
        return f"PyTorch is not installed: install torch for {what}"
    if getattr(torch.version, build, None) is None:
        return f"this PyTorch was built without {what}: install torch for {what}"
    return None if torch.cuda.is_available() else f"PyTorch finds no GPU for {what} here ({tool})"
