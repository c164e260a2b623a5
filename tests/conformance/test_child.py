# SPDX-License-Identifier: Apache-2.0
"""An object in a process of its own does what it is told, and its end and its errors are seen here."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kvxfer.errors import ConfigError, LeaseError
from kvxfer.testing import Child, ChildGoneError, eventually
from kvxfer.testing.remote import ChildRaisedError, ChildTraceback, call_all, wait_any


class Adder:
    """Lives in the process."""

    def __init__(self, tell=None, start=0):
        self.tell, self.total = tell, start
        if start is None:
            raise ConfigError("no start")

    def add(self, number, *, times=1):
        self.total += number * times
        return self.total

    def add_aloud(self, number):
        self.tell("total", self.add(number))

    def wait(self, seconds):
        time.sleep(seconds)
        return seconds

    def fail(self, kind):
        raise kind("as it was told to")

    def unspeakable(self):
        return lambda: None

    def close(self):
        os.write(1, b"closed")


def test_calls():
    """Calls are carried out in order, with arguments by place and by name; answers to several are taken in any order."""
    with Child("adder", Adder, None, 5) as child:
        assert child.call("add", 1) == 6
        child.ask("add", 1)
        second = child.ask("add", 2, times=3)
        assert child.answer(second) == 13
        assert child.answer() == 7


def test_calls_of_several():
    """Several objects are called at the same time."""
    children = [Child(f"adder {start}", Adder, None, start) for start in range(3)]
    try:
        assert call_all(children, "add", 10) == [10, 11, 12]
    finally:
        for child in children:
            child.close()


def test_errors():
    """What the object raises is raised here, as the same type where that was asked for, with the traceback of the child."""
    with Child("adder", Adder, raises=(ConfigError,)) as child:
        with pytest.raises(ConfigError, match="as it was told to") as kept:
            child.call("fail", ConfigError)
        with pytest.raises(ChildRaisedError, match="in the adder process: LeaseError: as it was told to") as other:
            child.call("fail", LeaseError)
        for raised in (kept, other):
            assert isinstance(raised.value.__cause__, ChildTraceback) and "in fail" in str(raised.value.__cause__)
        with pytest.raises(ChildRaisedError, match=r"pickle|lambda"):
            child.call("unspeakable")
        assert child.call("add", 1) == 1
    with (
        Child("adder", Adder, None, None, raises=(ConfigError,)) as child,
        pytest.raises(ConfigError, match="no start"),
    ):
        child.call("add", 1)


def test_a_call_that_takes_too_long():
    """A deadline is an error, and the answer that comes later is not taken for that of the next call."""
    with Child("adder", Adder) as child:
        child.ready()
        with pytest.raises(ChildGoneError, match=r"has not answered for 0\.1 s"):
            child.call("wait", 0.5, timeout_s=0.1)
        assert child.call("add", 3) == 3


def test_the_end():
    """A frozen child does nothing until it is thawed; a killed one is named; one that ends in order closes its object."""
    with Child("adder", Adder) as child:
        child.ready()
        child.freeze()
        child.ask("add", 1)
        with pytest.raises(ChildGoneError, match="has not answered"):
            child.answer(timeout_s=0.2)
        child.thaw()
        assert child.call("add", 1) == 2
        child.kill()
        with pytest.raises(ChildGoneError, match="the adder process ended \\(by signal 9\\)"):
            child.call("add", 1)
    child.close()
    assert not child.alive and child.exitcode == -9


def test_output_and_orders(tmp_path):
    """What an object tells is heard by and by; what it prints goes to a file; an order that raises ends it."""
    printed = tmp_path / "printed"
    with Child("adder", Adder, tells=True, output=str(printed)) as child:
        child.order("add_aloud", 1)
        child.order("add_aloud", 2)
        heard = []
        while len(heard) < 2:
            assert wait_any([child], 30) == [child]
            heard += child.told()
        assert heard == [("total", (1,)), ("total", (3,))]
        child.order("fail", LeaseError)
        assert child.join(20) and child.exitcode == 1
    assert "as it was told to" in printed.read_text() and "closed" in printed.read_text()


def test_no_pytest_is_needed():
    """Commands that drive processes run where only kvxfer itself is installed."""
    script = "import sys; sys.modules['pytest'] = None; import kvxfer.cli.demo, kvxfer.cli.calibrate"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


PARENT = """
import os, time
from kvxfer.testing import Child
from tests.conformance.test_child import Adder
if __name__ == "__main__":
    child = Child("adder", Adder)
    child.ready()
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_parent_that_is_killed(tmp_path):
    """A child ends with its parent, however that ends."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()

    def gone():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    eventually(gone, what="the child has ended")
