# SPDX-License-Identifier: Apache-2.0
"""Workaround for NIXL's wheel beside Debian's ibverbs-providers, which crash the process when it exits.

UCX's module for EFA (bundled with NIXL 1.5.1) loads the system's libefa and with it a second libnl, whose clean-up at exit
is a SIGSEGV: exit status 139, after all work is done, every time. UCX reads once which modules to load, when the first UCX
backend of the process starts; ``UCX_MODULES=^ib`` then avoids the crash, and costs nothing on a host without an HCA.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvxfer_nixl._module import NixlModule

_log = logging.getLogger("kvxfer.nixl")


def exit_crash_risk(module: NixlModule) -> str | None:
    """Reason, in one sentence, for which a process with a UCX backend of ``module`` crashes at exit; None if it does not."""
    if "UCX_MODULES" in os.environ:
        return None  # the operator has decided
    if not any(Path(module.path).parent.glob(f"{module.name}.libs/ucx/libuct_ib_efa*")):
        return None
    if has_hca():
        return None  # the module is needed there; whether it crashes was not tried
    system = _system_libefa()
    if system is None:
        return None
    return (
        f"{system} (ibverbs-providers) beside NIXL's own libraries crashes the process at exit (status 139); "
        "no InfiniBand or EFA device is here that would need it: set UCX_MODULES=^ib, or remove the package"
    )


def has_hca() -> bool:
    """Whether the kernel knows an RDMA device."""
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


@contextmanager
def without_exit_crash(module: NixlModule) -> Iterator[None]:
    """Have UCX start without InfiniBand, where it would crash the process at exit. For the start of a UCX backend.

    The environment belongs to the operator. So it is changed only if the crash is certain otherwise and ``UCX_MODULES`` is
    not set, and is restored at the end. It has no effect if a UCX backend was started earlier in this process.
    """
    risk = exit_crash_risk(module)
    if risk is None:
        yield
        return
    _log.warning("UCX starts without its InfiniBand modules, since %s", risk)
    os.environ["UCX_MODULES"] = "^ib"
    try:
        yield
    finally:
        os.environ.pop("UCX_MODULES", None)


def _system_libefa() -> Path | None:
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    folders += [Path("/usr/lib64"), Path("/lib64"), Path("/usr/lib"), *Path("/usr/lib").glob("*-linux-gnu")]
    return next((folder / "libefa.so.1" for folder in folders if (folder / "libefa.so.1").exists()), None)
