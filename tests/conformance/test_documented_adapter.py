# SPDX-License-Identifier: Apache-2.0
"""The adapter of docs/adapters.md passes the suites as it stands there."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from kvxfer.testing import AgentSuite, BufferSuite, MadeBuffer

_PAGE = Path(__file__).parents[2] / "docs/adapters.md"
_folder = tempfile.TemporaryDirectory(prefix="kvxfer-mine-")
_blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
_code = "\n".join(block for block in _blocks if not block.startswith("# tests/"))
# "from __future__" comes first in the agent's block only.
(Path(_folder.name) / "kvxfer_mine.py").write_text(_code)
sys.path.append(_folder.name)  # spawned processes get this path too

from kvxfer_mine import MyAgent, MyBuffer  # noqa: E402

linux = pytest.mark.skipif(sys.platform != "linux", reason="process_vm_readv is a call of Linux")


@linux
class TestDocumentedAgent(AgentSuite):
    make_agent = staticmethod(MyAgent)


def make(nbytes: int) -> MadeBuffer:
    array = np.zeros(nbytes, np.uint8)

    def write(data: bytes) -> None:
        array[:] = np.frombuffer(data, np.uint8)

    return MadeBuffer(MyBuffer(array), read=array.tobytes, write=write)


class TestDocumentedBuffer(BufferSuite):
    make_buffer = staticmethod(make)
