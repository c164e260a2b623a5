# SPDX-License-Identifier: Apache-2.0
"""Jobs on background threads, and the lock for turns between an engine and transfers."""

from __future__ import annotations

import threading

import pytest

from kvxfer.buffers.background import Background
from kvxfer.buffers.base import Completion
from kvxfer.buffers.fair_lock import FairLock
from kvxfer.testing import eventually


def test_a_job_is_a_completion():
    """A job tells whether it has ended, to any caller and repeatedly, and `wait` keeps its timeout."""
    go = threading.Event()
    job = Background("test", 1).start(go.wait)
    assert isinstance(job, Completion)
    assert job.done is False and job.wait(0.01) is False
    go.set()
    assert job.wait(30) is True and job.done is True and job.wait() is True


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("the job's own")])
def test_a_job_that_fails(error):
    """Waiting for a job raises the error of the job, a TimeoutError too; the job is done all the same."""

    def fail():
        raise error

    job = Background("test", 1).start(fail)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            job.wait(30)
    assert job.done is True


def test_jobs_begin_in_order():
    """Jobs begin in the order in which they were given, and as many at a time as there are threads."""
    background, begun, go = Background("test", 2), [], threading.Event()

    def job(number):
        begun.append(number)
        go.wait(30)

    jobs = [background.start(lambda i=i: job(i)) for i in range(4)]
    eventually(lambda: begun == [0, 1])
    go.set()
    assert all(each.wait(30) for each in jobs) and sorted(begun) == [0, 1, 2, 3]


def test_waiting_threads_go_first():
    """A thread that acquires the lock again lets the waiting threads go first, in the order of arrival."""
    turn, order = FairLock(), []

    def wait(number):
        with turn:
            order.append(number)

    turn.acquire()
    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        eventually(lambda n=number: turn.waiting == n + 1)
    turn.release()
    with turn:
        order.append("again")
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, "again"]


def test_a_timeout_leaves_the_queue():
    """A thread that stops waiting is not granted the lock, and does not keep other threads from it."""
    turn = FairLock()
    assert turn.acquire(0) is True
    assert turn.acquire(0.01) is False and turn.acquire(0) is False
    turn.release()
    assert turn.acquire(0) is True


def test_one_at_a_time():
    """Of many threads that take turns, one at a time holds the lock."""
    turn, inside, most, total = FairLock(), 0, 0, 0

    def work():
        nonlocal inside, most, total
        for _ in range(300):
            with turn:
                inside += 1
                most = max(most, inside)
                total += 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, total, inside) == (1, 2400, 0)
