# SPDX-License-Identifier: Apache-2.0
"""Wake-ups of the control thread: none is lost, and the caller keeps the interpreter's lock."""

from __future__ import annotations

import os
import select
import socket
import sys

import numpy as np
import pytest

from kvxfer import Endpoint, KVCache, LeaseRef
from kvxfer.channel.wakeup import WakeUp
from kvxfer.testing import eventually
from tests.core.channel.intruder import Intruder


def test_a_thread_that_waits_for_the_lock_does_not_get_it():
    """A ring keeps the interpreter's lock; `socket.send`, which releases it, shows that the test would notice."""
    wakeup = WakeUp()
    ours, theirs = socket.socketpair()
    with Intruder() as intruder:
        for _ in range(300):
            intruder.during(wakeup.ring)
            wakeup.clear()
        assert intruder.came == 0

        def sent():
            for _ in range(20):
                ours.send(b"w")

        for _ in range(300):
            intruder.during(sent)
            theirs.recv(4096)
    assert intruder.came > 0
    for each in (wakeup, ours, theirs):
        each.close()


def test_it_can_be_polled():
    """The descriptor is readable from the first ring until it is cleared, and again after the next ring."""
    wakeup = WakeUp()
    for rings in (1, 3):
        assert select.select([wakeup], [], [], 0) == ([], [], [])
        for _ in range(rings):
            wakeup.ring()
        assert select.select([wakeup], [], [], 0) == ([wakeup], [], [])
        wakeup.clear()
    wakeup.close()


def orders(left):
    """All orders in which threads can take so many steps each."""
    if not any(left):
        yield ()
    for thread, steps in enumerate(left):
        if steps:
            rest = (*left[:thread], steps - 1, *left[thread + 1 :])
            for order in orders(rest):
                yield (thread, *order)


@pytest.mark.parametrize("interrupted", [False, True], ids=["", "one is interrupted before it rings"])
def test_no_wake_up_is_lost(interrupted):
    """For any order of the steps of two rings and one poll, the work is done or the descriptor is readable.

    A ring is to leave word and to ring, a turn of the poller is to do what there is, to look, and to clear if it was rung.
    """
    wakeup = WakeUp()
    for order in orders((2, 2, 6)):
        left_word, rung, done, stand = set(), set(), set(), [0, 0, 0]

        def readable():
            return bool(select.select([wakeup], [], [], 0)[0])

        for thread in order:
            step, stand[thread] = stand[thread], stand[thread] + 1
            if thread == 2:
                if step % 3 == 0:
                    done |= left_word
                elif step % 3 == 1:
                    assert rung <= done or readable(), f"it would sleep for ever: {order}"
                elif readable():
                    wakeup.clear()
            elif step == 0:
                left_word.add(thread)
            elif not (interrupted and thread == 0):
                wakeup.ring()
                rung.add(thread)
        wakeup.clear()
    wakeup.close()


def test_a_ring_that_is_interrupted():
    """An exception in the middle of a ring, as a signal handler may raise, takes no later ring away."""
    wakeup = WakeUp()

    class InterruptedHereError(Exception):
        pass

    def interrupt(frame, event, arg):
        if frame.f_code is WakeUp.ring.__code__ and event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == at_line:
                raise InterruptedHereError
        return interrupt

    for at_line in range(1, 12):  # noqa: B007 - of the hook above
        lines = []
        sys.settrace(interrupt)
        try:
            wakeup.ring()
        except InterruptedHereError:
            pass
        finally:
            sys.settrace(None)
        wakeup.clear()
        wakeup.ring()
        assert select.select([wakeup], [], [], 0)[0], f"lost after an interruption at line {lines[-1]}"
        wakeup.clear()
    wakeup.close()


def test_closed():
    """A ring after the end harms no file, not even one that has got the same descriptor; the files are closed with the object."""
    wakeup = WakeUp()
    number = wakeup.fileno()
    wakeup.close()
    others = socket.socketpair()
    wakeup.ring()
    assert wakeup.fileno() == -1
    assert select.select(others, [], [], 0)[0] == []
    for each in others:
        each.close()
    del wakeup
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.parametrize("request_blocks", [64, 2048])
def test_calls_of_an_engine(request_blocks):
    """No call of an engine for a transfer releases the interpreter's lock."""
    shape = {"layers": 1, "blocks": 4096, "heads": 1, "block_tokens": 1, "head_dim": 2}
    caches = [KVCache.allocate("HND", **shape)[0] for _ in range(2)]
    source, target = (np.random.default_rng(i).permutation(4096)[:request_blocks].tolist() for i in range(2))
    with (
        Endpoint(caches[0], "inproc") as producer,
        Endpoint(caches[1], "inproc") as consumer,
        Intruder() as intruder,
    ):
        for round_ in range(60):
            ref = LeaseRef.mint(producer=producer.name, addresses=[producer.address])
            calls = {
                "announce": lambda ref=ref: producer.announce(ref),
                "seal": lambda ref=ref: producer.publish(ref, source[:-5], complete=False),
                "offer": lambda ref=ref: producer.publish(ref, source),
                "hold": lambda ref=ref: consumer.acquire(ref),
                "read": lambda ref=ref: consumer.read(ref, target),
                "poll": lambda: (producer.poll(), consumer.poll()),
            }
            for name, call in calls.items():
                if name == "read" and round_ % 2:
                    eventually(lambda ref=ref: consumer.granted(ref))
                result = intruder.during(call)
                assert intruder.came == 0, name
                if name == "read":
                    transfer = result
            assert transfer.wait(30)
