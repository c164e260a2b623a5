# SPDX-License-Identifier: Apache-2.0
"""`kvxfer doctor --peer`: its verdict on a link, and the care with which it reads over one that ties two fates."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest

from kvxfer.agents.finding import State
from kvxfer.cli import rates
from kvxfer.cli.diagnosis import host
from kvxfer.cli.diagnosis.link import Wire, on_one_host, speed
from kvxfer.cli.interrupts import signals_held_back

ETH = Wire("eth7", 1.25e9)


def test_a_link_that_is_slower_than_its_device():
    """A tenth of what the device and the latency allow is named with the device, in a line that can be pasted; half is good."""
    allowed_s = 100e-6 + 65536 / ETH.nbytes_per_s
    (slow,) = speed(65536, 10 * allowed_s, 100e-6, ETH)
    assert slow.state is State.NOTE and "0.10 of what eth7 (1.25 GB/s)" in slow.text and "show dev eth7" in slow.fix
    (fast,) = speed(65536, 2 * allowed_s, 100e-6, ETH)
    assert fast.state is State.GOOD and not fast.fix


def test_a_device_of_unknown_speed_is_not_judged():
    """The loopback tells no speed."""
    (found,) = speed(65536, 10.0, 100e-6, Wire("lo", 0.0))
    assert found.state is State.GOOD and "over lo" in found.text


def test_a_memory_copy_that_is_slow():
    """Between two processes of one host a hundredth of a plain copy is too slow."""
    nbytes = 4 << 20
    (found,) = speed(nbytes, 1.0, 1e-6, None)
    assert found.state is State.NOTE and "of a plain copy" in found.text and found.fix


def test_tcp_between_two_processes_of_one_host():
    """What forbids memory copies is the advice; if nothing does, a setting of UCX."""
    forbidden = list(host.copies_between_processes(errno.EPERM, Path("/nonexistent")))
    (found,) = on_one_host(forbidden)
    assert "process_vm_readv" in found.text and found.fix.startswith("docker run --cap-add SYS_PTRACE")
    (found,) = on_one_host([])
    assert found.fix.startswith("unset UCX_TLS")


def test_no_signal_ends_a_read():
    """An interruption comes after the block, not in its middle."""
    reached = []

    def interrupted():
        with signals_held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_device_of_an_address():
    """This machine's loopback address has a device, another machine's has none; a speed is Mbit/s in a file."""
    assert rates.device_of("127.0.0.1") == "lo" and rates.device_of("192.0.2.77") is None
    assert rates.own_ip_towards("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize(("text", "nbytes_per_s"), [("10000\n", 1.25e9), ("-1\n", 0.0), ("", 0.0)])
def test_the_speed_of_a_device(tmp_path, text, nbytes_per_s):
    """A device that is down, or tells none, has no speed."""
    file = tmp_path / "sys/class/net/eth7/speed"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert rates.device_nbytes_per_s("eth7", tmp_path) == nbytes_per_s
    assert rates.device_nbytes_per_s("eth8", tmp_path) == 0.0
