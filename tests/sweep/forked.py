# SPDX-License-Identifier: Apache-2.0
"""vLLM servers as forks of a process that has imported vLLM: up in seconds, with the code, HTTP and processes of any other server."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path
from typing import IO, Any

from tools.serve.pair import SERVER_ENVIRONMENT, VllmServer

__all__ = ["ForkedServer", "import_vllm"]

_OPEN_FILES = 1024


def import_vllm() -> None:
    """Import what a server needs, with settings that are read only then. Starts no thread."""
    os.environ.update(SERVER_ENVIRONMENT)
    if importlib.util.find_spec("pycountry") is None:
        # transformers asks each processor of images whether its tokenizer is Mistral's, whose module wants this one's lists.
        countries: Any = types.ModuleType("pycountry")
        countries.languages = countries.language_families = []
        sys.modules["pycountry"] = countries
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401


class ForkedServer(VllmServer):
    """A server that is a fork of this process instead of a new interpreter.

    Start it while no other thread of this process runs.
    """

    def _spawn(self, sink: IO[bytes]) -> Any:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return _Fork(pid)
        status = 1
        try:
            os.setsid()
            with Path(os.devnull).open("rb") as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            # The guard's pipe among them, which tells it that this server's parent has ended.
            os.closerange(3, _OPEN_FILES)
            self._serve()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - printed, and the process ends
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _serve(self) -> None:
        """Serve until told to end; white-box: vLLM looks at a model's class in a new interpreter, for which a fork needs none."""
        from vllm.entrypoints.launchers.api_server.entry import main
        from vllm.model_executor.models import registry

        # A server of one rank needs no process for it. vLLM's CPU platform would start one, which polls, and so takes a core.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if "--distributed-executor-backend" not in self.command:
            self.command += ["--distributed-executor-backend", "uni"]
        # The CPU platform starts its processes by spawn, whatever the environment says.
        fork = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda *_: fork
        registry._run_in_subprocess = lambda look: look()
        os.environ.update(self.environment)
        sys.argv = self.command[2:]
        main()


class _Fork:
    """The methods of `subprocess.Popen` that a `ServerProcess` calls, for a child that was forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            time.sleep(0.01)
        return self.returncode or 0
