# SPDX-License-Identifier: Apache-2.0
"""Completions that raise or hang affect only what waits for them."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from kvxfer.buffers.base import FINISHED, HostBuffer, wait_for_end
from kvxfer.buffers.completions import MOST_ASKERS, is_completion, watched
from kvxfer.errors import ConfigError, KvxferError, TransferFailedError, TransferTimeoutError
from kvxfer.protocol.transfer import LeaseExpired, LeaseReleased, LeaseRevoked
from kvxfer.runtime import read_requests
from kvxfer.testing import eventually, stays
from tests.core.engine import Engine


class Raising:
    """A completion whose device is gone: asking it raises."""

    @property
    def done(self):
        raise OSError("the device is gone")

    def wait(self, timeout_s=None):
        raise OSError("the device is gone")


class RaisesInWait:
    """A completion that has ended, and whose `wait` raises a BaseException that is no Exception."""

    done = True

    def wait(self, timeout_s=None):
        raise SystemExit("the device is gone")


class Hanging:
    """A completion that does not return from ``done``, or from ``wait`` after that."""

    def __init__(self, where):
        self.where, self.let_go = where, threading.Event()

    @property
    def done(self):
        if self.where == "done":
            self.let_go.wait()
        return True

    def wait(self, timeout_s=None):
        self.let_go.wait()
        return True


@pytest.fixture
def hanging():
    """Make completions that hang until the test is over."""
    made = []

    def make(where="done"):
        made.append(Hanging(where))
        return made[-1]

    yield make
    for each in made:
        each.let_go.set()


@pytest.fixture
def pair(engines):
    """A producer and a consumer."""
    return engines(), engines()


@pytest.mark.parametrize("kind", [Raising, RaisesInWait])
@pytest.mark.parametrize("at_once", [False, True])
def test_one_that_raises_has_ended(kind, at_once):
    """It is done, and raises a named error; asked again it says the same."""
    kind = type(kind.__name__, (kind,), {"answers_at_once": at_once})
    each = watched(kind())
    eventually(lambda: each.done)
    for _ in range(2):
        with pytest.raises(TransferFailedError, match="the device is gone"):
            each.wait(0)


@pytest.mark.parametrize("where", ["done", "wait"])
def test_one_that_hangs_has_not_ended(hanging, where):
    """Asking it returns at once, and others are asked meanwhile."""
    stuck, other = watched(hanging(where)), watched(Raising())
    began = time.monotonic()
    assert not stuck.done and not stuck.wait(0.05)
    assert time.monotonic() - began < 5
    eventually(lambda: stuck.done or other.done)
    assert other.done and not stuck.done


def test_more_hang_than_there_are_threads(hanging):
    """However many hang, no more than a few threads wait for them; when they return, all are done."""
    threads, held = threading.active_count(), [hanging() for _ in range(2 * MOST_ASKERS)]
    each = [watched(one) for one in held]

    def ended():
        return [one for one in each if one.done]

    stays(lambda: not ended())
    assert threading.active_count() <= threads + MOST_ASKERS
    for one in held:
        one.let_go.set()
    eventually(lambda: len(ended()) == len(each), timeout_s=20)


def test_no_thread_stays():
    """The threads that ask end when there is nothing to ask."""

    def askers():
        return [thread for thread in threading.enumerate() if thread.name == "kvxfer-completions"]

    each = watched(Raising())
    eventually(lambda: each.done)
    eventually(lambda: not askers(), timeout_s=20)


def test_what_is_a_completion():
    """An object is a completion by its attributes; none of them is called to find out."""
    assert is_completion(Raising()) and is_completion(FINISHED)
    assert not is_completion(object()) and not is_completion(None)
    assert watched(FINISHED) is FINISHED


@pytest.mark.parametrize("where", ["done", "wait"])
def test_copies_are_not_waited_for_without_end(hanging, where, caplog):
    """A copy that does not end is given up after a while, and that is logged."""
    assert not wait_for_end([FINISHED, hanging(where), watched(hanging(where))], timeout_s=0.3)
    assert "2 copies of a device have not ended" in caplog.text
    assert wait_for_end([FINISHED, Raising(), watched(RaisesInWait())], timeout_s=10)


@pytest.mark.parametrize("kind", [Raising, RaisesInWait])
def test_a_read_after_one_that_raises(pair, kind):
    """Its own read fails with a named error; the deadlines of other reads are kept, and other reads go on."""
    source, sink = pair
    late = sink.endpoint.read(source.endpoint.announce(), [3], timeout_s=0.5)
    transfer = sink.endpoint.read(source.endpoint.lease([1]), [7], after=[kind()])
    with pytest.raises(TransferFailedError, match="the device is gone"):
        transfer.wait(20)
    assert sink.endpoint.read(source.endpoint.lease([2]), [8]).wait(20)
    with pytest.raises(KvxferError):
        late.wait(20)
    eventually(lambda: not sink.endpoint.in_use()["reads"])


@pytest.mark.parametrize("where", ["done", "wait"])
def test_a_read_after_one_that_hangs(pair, hanging, where):
    """Its own read ends at its deadline and has written nothing; others go on, and close returns."""
    source, sink = pair
    before = {name: layer[7].copy() for name, layer in sink.layers.items()}
    transfer = sink.endpoint.read(source.endpoint.lease([1]), [7], timeout_s=1.0, after=hanging(where))
    assert sink.endpoint.read(source.endpoint.lease([2]), [8]).wait(20)
    with pytest.raises(TransferTimeoutError, match="this side's device"):
        transfer.wait(20)
    assert all((layer[7] == before[name]).all() for name, layer in sink.layers.items())
    unended = sink.endpoint.read(source.endpoint.lease([1]), [7], after=hanging(where))
    sink.endpoint.close()
    assert unended.done


@pytest.mark.parametrize(
    ("after", "event"), [(Raising(), LeaseRevoked), (RaisesInWait(), LeaseRevoked), ("hangs", LeaseExpired)]
)
def test_an_offer_after_one(pair, hanging, after, event):
    """A publication after a device that fails or hangs has its one event, and delays no other one."""
    source, sink = pair
    ref = source.endpoint.announce()
    source.endpoint.publish(ref, [1], after=hanging() if after == "hangs" else after)
    assert sink.endpoint.read(source.endpoint.lease([2]), [8]).wait(20)
    if after == "hangs":
        assert source.endpoint.in_use()["leases"] >= 1
    end = source.end(ref)
    assert isinstance(end, event) and len(source.ends(ref)) == 1
    eventually(lambda: not source.endpoint.in_use()["leases"])
    assert any(isinstance(each, LeaseReleased) for each in source.poll())


def test_close_out_of_a_completion(engines):
    """A completion may close the endpoint that asks it: the call returns, and so does any other close."""

    class Closing:
        answers_at_once = True
        called = False

        @property
        def done(self):
            type(self).called = True
            sink.endpoint.close()
            return False

        def wait(self, timeout_s=None):
            return False

    source, sink = engines(), engines()
    transfer = sink.endpoint.read(source.endpoint.lease([1]), [7], after=[Closing()])
    with pytest.raises(KvxferError):
        transfer.wait(20)
    sink.endpoint.close()
    assert Closing.called and sink.endpoint.in_use()["reads"] == 0


@pytest.mark.parametrize("after", [[object()], None, [Raising]])
def test_what_is_none(pair, after):
    """Something without ``done`` and ``wait`` is refused at the call."""
    source, sink = pair
    if after == [Raising]:
        after = [type("NoWait", (), {"done": True})()]
    with pytest.raises(ConfigError, match="able to say done and wait"):
        sink.endpoint.read(source.endpoint.lease([1]), [7], after=after)


class StuckBuffer(HostBuffer):
    """A device that does not end what it unpacks, and does not even come back when it is asked."""

    held = None

    def _unpack(self, copies, packed):
        return self.held()


def test_a_device_that_hangs(hanging, monkeypatch):
    """A device whose copies hang ends neither other reads nor, after a while, the close."""
    monkeypatch.setattr(read_requests, "wait_for_end", partial(wait_for_end, timeout_s=0.5))
    source, other = Engine(0), Engine(1)
    sink = Engine(2, route="target_unpacked")
    StuckBuffer.held = staticmethod(hanging)
    try:
        for buffer in sink.cache.buffers:
            buffer.__class__ = StuckBuffer
        stuck = sink.endpoint.read(source.endpoint.lease([1]), [7], timeout_s=0.5)
        late = sink.endpoint.read(source.endpoint.announce(), [3], timeout_s=1.0)
        with pytest.raises(KvxferError):
            late.wait(20)
        assert other.endpoint.read(sink.endpoint.lease([2]), [8]).wait(20)
        assert not stuck.done, "its blocks are not quiet"
        sink.endpoint.close()
        assert stuck.done
    finally:
        for engine in (source, other, sink):
            engine.endpoint.close()
