# SPDX-License-Identifier: Apache-2.0
"""Plug-in of pytest that makes vLLM believe that it was built for CPUs, for `tests.vllm.other_version`. White-box."""

from __future__ import annotations

import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # vLLM asks the name of its distribution, which is another one here
