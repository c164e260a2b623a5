# SPDX-License-Identifier: Apache-2.0
"""One trap by itself: NIXL's wheel beside Debian's ibverbs-providers crashes the process when it exits.

UCX's module for EFA (bundled with NIXL 1.5.1) loads the system's libefa and with it a second libnl, whose clean-up at exit
is a SIGSEGV: exit status 139, after all work is done, every time. UCX reads which modules to load once, when the first UCX
backend of the process starts; ``UCX_MODULES=^ib`` there avoids it and costs nothing on a host without an HCA.
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
    """Why a process with a UCX backend of ``module`` will crash when it exits, in one sentence; None if it will not."""
    if "UCX_MODULES" in os.environ:
        return None  # the operator decides
    if not any(Path(module.path).parent.glob(f"{module.name}.libs/ucx/libuct_ib_efa*")):
        return None
    if has_hca():
        return None  # there the module is needed; whether it crashes there was not tried
    system = _system_libefa()
    if system is None:
        return None
    return (
        f"{system} (ibverbs-providers) beside NIXL's own libraries crashes the process at exit (status 139); "
        "no InfiniBand or EFA device is here that would need it: set UCX_MODULES=^ib, or remove the package"
    )


def has_hca() -> bool:
    """The kernel knows an RDMA device."""
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


@contextmanager
def without_exit_crash(module: NixlModule) -> Iterator[None]:
    """Around the start of a UCX backend: where it would crash the process at exit, UCX is told to leave InfiniBand out.

    The environment is the operator's, so it is touched only if the crash is certain otherwise, only if they said nothing
    about ``UCX_MODULES``, and is put back before this returns. A backend that somebody else started earlier in this
    process has settled the matter for good; then this changes nothing.
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
