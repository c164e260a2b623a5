# SPDX-License-Identifier: Apache-2.0
"""A failed transfer keeps the reason for its failure as long as its engine keeps it, and no objects of the read."""

from __future__ import annotations

import traceback
import weakref

import numpy as np
import pytest

from kvxfer import LeaseRef
from kvxfer.errors import TransferFailedError
from kvxfer.protocol.transfer import Transfer

REF = LeaseRef.mint(producer="p", addresses=["tcp://127.0.0.1:1"])


def failed(kept):
    """An error that came through functions which had an array in hand, and so did its cause."""

    def inner():
        array = np.zeros(10)
        kept.append(weakref.ref(array))
        raise ValueError(len(array))

    def outer():
        array = np.zeros(10)
        kept.append(weakref.ref(array))
        try:
            inner()
        except ValueError as error:
            raise TransferFailedError(f"the agent raised {error}") from error

    try:
        outer()
    except TransferFailedError as error:
        return error


def test_nothing_of_the_read_is_kept():
    """A transfer that has failed, and is kept, lets go of the arrays of the read; it still tells why, and where the cause was raised."""
    kept = []
    error = failed(kept)
    assert all(each() is not None for each in kept)
    transfer = Transfer(REF, [], None, 1e9, lambda _: None)
    transfer.end(error)
    assert [each() for each in kept] == [None, None]
    assert transfer.error is error
    with pytest.raises(TransferFailedError, match="the agent raised 10") as raised:
        transfer.wait()
    assert "in inner" in "".join(traceback.format_exception(raised.value.__cause__))
