# SPDX-License-Identifier: Apache-2.0
"""The first request of a pair that has just started."""

from __future__ import annotations


def test_the_first_request_of_a_cold_pair_is_right(lab):
    """The first request, before any handshake and with cold kernels, has the tokens of one server (see `Lab.start`)."""
    assert lab.first_answer.ok, lab.first_answer.body
    assert lab.first_answer.tokens == lab.first_expected.tokens
