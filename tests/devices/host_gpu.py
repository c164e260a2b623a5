# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a GPU, in host memory: it has a runtime's streams and events, and all work ends at once.

It shows what does not depend on a GPU: which bytes are moved, with the kernel and with PyTorch's operations. The kernel runs
in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from functools import cache

from kvxfer_gpu import GpuBuffer
from kvxfer_gpu.runtime import Runtime
from kvxfer_rocm import RocmBuffer


class Ended:
    """An event of work that has ended."""

    def record(self, stream):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass


class HostGpu(Runtime):
    """A runtime that moves with PyTorch's operations."""

    @staticmethod
    def _kernels():
        return None

    def stream(self):
        return None

    def on(self, stream):
        return contextlib.nullcontext()

    def event(self):
        return Ended()

    @classmethod
    def passed(cls, device):  # noqa: ARG003
        return Ended()

    @classmethod
    def pin(cls, memory):  # noqa: ARG003
        return lambda: None

    def casts_on_kernel(self, source, target):
        return True


@cache
def interpreted():
    """The kernel, built for Triton's interpreter, which is decided when its module is imported."""
    spec = importlib.util.find_spec("kvxfer_gpu._kernel")
    module = importlib.util.module_from_spec(spec)
    sys.modules["interpreted_kernel"] = module
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        spec.loader.exec_module(module)
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
    return module


class InterpretedGpu(HostGpu):
    """A runtime that moves with the kernel."""

    @staticmethod
    def _kernels():
        return interpreted()

    def casts_on_kernel(self, source, target):
        # The interpreter rounds float8 in another way than GPUs do, and cuts bfloat16 off (Triton 3.9).
        return "float8_e4m3fn" not in (source, target) and target != "bfloat16"


class RowsBuffer(GpuBuffer):
    """Moves with PyTorch's operations."""

    devices = ("cpu",)
    runtime = HostGpu
    registrable = False


class RocmStandIn(RocmBuffer):
    """An AMD GPU's buffer, whose memory is the host's."""

    devices = ("cpu",)
    runtime = HostGpu
    registrable = False

    @classmethod
    def why_unavailable(cls):
        return None


class KernelBuffer(RowsBuffer):
    """Moves with the kernel."""

    runtime = InterpretedGpu
