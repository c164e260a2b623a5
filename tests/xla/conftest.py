# SPDX-License-Identifier: Apache-2.0
"""Several devices on one CPU, and none of another kind: to be said before JAX or torch_xla is imported."""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_DEVICE", "CPU")
