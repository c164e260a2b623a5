# SPDX-License-Identifier: Apache-2.0
"""All devices for the tests of all pairs, by name. A new device needs a line here."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from kvxfer.testing.devices import Device, HostDevice

if TYPE_CHECKING:
    from kvxfer.buffers.base import DeviceBuffer

_ELSEWHERE = "make test-xla runs this in an environment of its own"


class JaxDevice(Device):
    """JAX's own choice of device: a TPU where there is one, else the CPU through XLA."""

    def why_unavailable(self) -> str | None:
        return None if find_spec("jax") else f"jax is not installed: {_ELSEWHERE}"

    def make(self, content: np.ndarray) -> DeviceBuffer:
        import jax

        from kvxfer_jax import JaxBuffer

        return JaxBuffer(jax.device_put(content, may_alias=False))

    def bytes_of(self, buffer: DeviceBuffer) -> np.ndarray:
        return np.asarray(buffer.array).reshape(-1).view(np.uint8).copy()


class GpuDevice(Device):
    """A GPU of PyTorch, or a stand-in for one; ``module:class`` names the class of its buffers.

    Args:
        torch_device: where PyTorch puts the tensors.
    """

    def __init__(self, buffers: str, torch_device: str) -> None:
        self._buffers, self._torch_device = buffers, torch_device

    def why_unavailable(self) -> str | None:
        if not find_spec("torch"):
            return "torch is not installed"
        return self._class().why_unavailable()

    def _class(self):
        module, _, name = self._buffers.partition(":")
        return getattr(import_module(module), name)

    def make(self, content: np.ndarray) -> DeviceBuffer:
        import torch

        tensor = torch.from_numpy(content.copy()).to(self._torch_device)
        self._settle()
        return self._class()(tensor)

    def bytes_of(self, buffer: DeviceBuffer) -> np.ndarray:
        self._settle()
        return buffer.array.cpu().numpy().reshape(-1).view(np.uint8).copy()

    def _settle(self) -> None:
        import torch

        if self._torch_device != "cpu":
            torch.cuda.synchronize()


class XlaDevice(Device):
    """torch_xla's device: a TPU where there is one, else the CPU through XLA."""

    def why_unavailable(self) -> str | None:
        return None if find_spec("torch_xla") else f"torch_xla is not installed: {_ELSEWHERE}"

    def make(self, content: np.ndarray) -> DeviceBuffer:
        os.environ.setdefault("PJRT_DEVICE", "CPU")
        import torch
        import torch_xla  # noqa: F401 - what .to("xla") needs

        from kvxfer_xla import XlaBuffer

        return XlaBuffer(torch.from_numpy(content.copy()).to("xla"))

    def bytes_of(self, buffer: DeviceBuffer) -> np.ndarray:
        return buffer.tensor.cpu().numpy().reshape(-1).view(np.uint8).copy()


DEVICES: dict[str, Device] = {
    "host": HostDevice(),
    "cuda": GpuDevice("kvxfer_cuda:CudaBuffer", "cuda"),
    "cuda, staged": GpuDevice("kvxfer_cuda:StagedCudaBuffer", "cuda"),
    "rocm (a stand-in)": GpuDevice("tests.devices.host_gpu:RocmStandIn", "cpu"),
    "jax": JaxDevice(),
    "xla": XlaDevice(),
}
