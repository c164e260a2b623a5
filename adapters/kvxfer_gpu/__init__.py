# SPDX-License-Identifier: Apache-2.0
"""Memory of the GPUs that PyTorch calls ``cuda``: the common part of the adapters `kvxfer_cuda` and `kvxfer_rocm`."""

from kvxfer_gpu._torch import why_unavailable
from kvxfer_gpu.buffer import GpuBuffer
from kvxfer_gpu.completion import EventCompletion

__all__ = ["EventCompletion", "GpuBuffer", "why_unavailable"]
