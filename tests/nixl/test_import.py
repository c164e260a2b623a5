# SPDX-License-Identifier: Apache-2.0
"""NIXL's import reconfigures logging and prints; through kvxfer it must leave the process as it was."""

from __future__ import annotations

MAKE_AGENT = """
from kvxfer_nixl import NixlAgent
agent = NixlAgent("import-test", backend_options={"UCX": {"engine_config": "NET_DEVICES=lo"}})
"""


def test_importing_the_adapter_imports_no_vendor(run_python):
    """`import kvxfer_nixl` imports neither NIXL nor torch before an agent is made."""
    run_python("import sys, kvxfer_nixl; assert not {'nixl', 'nixl_cu13', 'nixl_cu12', 'torch'} & sys.modules.keys()")


def test_logging_survives(run_python, tmp_path):
    """Handlers stay open, keep their records and their levels, and raiseExceptions stays on."""
    log = tmp_path / "host.log"
    program = f"""
import logging
handler = logging.FileHandler({str(log)!r}, mode="w")
logging.getLogger().addHandler(handler)
logging.getLogger("host").warning("before")
{MAKE_AGENT}
logging.getLogger("host").warning("after")
assert logging.raiseExceptions
assert logging.getLogger().handlers == [handler], logging.getLogger().handlers
assert not logging.getLogger("nixl").handlers
"""
    run_python(program)
    assert log.read_text().split() == ["before", "after"]


def test_logging_can_be_configured_by_others_meanwhile(run_python):
    """While NIXL is imported, only NIXL's own call of dictConfig is ignored."""
    run_python("""
import logging, logging.config
from kvxfer_nixl._module import _logging_left_alone
original = logging.config.dictConfig
with _logging_left_alone():
    logging.config.dictConfig({"version": 1, "loggers": {"nixl": {"level": "INFO"}}})
    logging.config.dictConfig({"version": 1, "loggers": {"host": {"level": "ERROR"}}})
    logging.raiseExceptions = False
assert logging.config.dictConfig is original and logging.raiseExceptions
assert logging.getLogger("nixl").level == logging.NOTSET
assert logging.getLogger("host").level == logging.ERROR
""")


def test_stdout_and_environment_are_left_alone(run_python):
    """Finding NIXL, making an agent and closing it prints nothing to stdout, keeps os.environ and imports no torch."""
    done = run_python(f"""
import os, sys
before = dict(os.environ)
{MAKE_AGENT}
agent.close()
assert dict(os.environ) == before
assert "torch" not in sys.modules
""")
    assert done.stdout == ""
