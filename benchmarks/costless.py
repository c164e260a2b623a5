# SPDX-License-Identifier: Apache-2.0
"""A GPU on which everything takes no time and nothing is moved: what is left is what the host does to ask for it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

from kvxfer_gpu import GpuBuffer
from kvxfer_gpu.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class _Event:
    """Ended."""

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class _Kernel:
    @staticmethod
    def move(*_: object) -> None: ...


class CostlessRuntime(Runtime):
    """See the module."""

    @staticmethod
    def _kernels() -> Any:
        return _Kernel

    def stream(self) -> Any:
        return None

    def on(self, stream: Any) -> Any:  # noqa: ARG002
        return contextlib.nullcontext()

    def event(self) -> Any:
        return _Event()

    @classmethod
    def passed(cls, device: Any) -> Any:  # noqa: ARG003
        return _Event()

    @classmethod
    def pin(cls, memory: Any) -> Callable[[], object]:  # noqa: ARG003
        return lambda: None

    def copy(self, source: Any, target: Any) -> None: ...

    def casts_on_kernel(self, source: str, target: str) -> bool:  # noqa: ARG002
        return True


class CostlessBuffer(GpuBuffer):
    """Memory of such a GPU, which is the host's and has no address for transfer engines."""

    devices: ClassVar[Sequence[str]] = ("cpu",)
    runtime: ClassVar[type[Runtime]] = CostlessRuntime
    registrable: ClassVar[bool] = False
