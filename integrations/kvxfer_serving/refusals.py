# SPDX-License-Identifier: Apache-2.0
"""Reasons for which the parameters of a request are not followed. They are named alike by every engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class RefusalReason(str, enum.Enum):
    """Reason for which parameters were not followed: the label ``reason`` of ``vllm:kvxfer_refused_params``.

    The request is computed locally, as if it had come without parameters.
    """

    NOT_AN_OBJECT = "not_an_object"
    """``kv_transfer_params`` is not a JSON object."""
    BAD_FLAG = "bad_flag"
    """``do_remote_prefill`` or ``do_remote_decode`` is neither a boolean nor null."""
    BOTH_FLAGS = "both_flags"
    """Both flags are set on a server that is not both producer and consumer (``kv_both``), or without a lease."""
    NOT_A_PRODUCER = "not_a_producer"
    """``do_remote_decode`` on a server whose ``kv_role`` is ``kv_consumer``."""
    NOT_A_CONSUMER = "not_a_consumer"
    """``do_remote_prefill`` on a server whose ``kv_role`` is ``kv_producer``."""
    NO_LEASE = "no_lease"
    """The key ``kvxfer`` is missing: the prefill server did not run kvxfer, or a client invented the parameters."""
    BAD_LEASE = "bad_lease"
    """The value of ``kvxfer`` is not a lease."""
    MISSING_KEY = "missing_key"
    """One of NixlConnector's or MooncakeConnector's keys is missing."""
    BAD_TYPE = "bad_type"
    """The value of one of these keys has the wrong type or is out of range."""
    BAD_BLOCKS = "bad_blocks"
    """``remote_block_ids`` is no list of block ids, or has more of them than the prompt has tokens."""
    CONTRADICTION = "contradiction"
    """The lease and NixlConnector's keys name different engines, requests, ranks or numbers of tokens."""
    OTHER_MODE = "other_mode"
    """The request was sent to both servers at once, or its producer pushes, and this server has ``"mode": "pull"``."""
    NO_PRODUCER = "no_producer"
    """``remote_bootstrap_addr`` leads to no prefill server that runs kvxfer, or not in time."""
    OWN_ENGINE = "own_engine"
    """The lease was made by this server, or the named prefill server is this server."""
    OTHER_PROMPT = "other_prompt"
    """The lease is for another prompt than the request's."""
    OTHER_WEIGHTS = "other_weights"
    """The lease is for the request's prompt, computed with another version of the weights."""
    LEASE_USED = "lease_used"
    """Another request has, or had, the same lease, and its blocks are in no prefix cache of this server's."""
    NO_MEDIA = "no_media"
    """The lease is for the same tokens with images or other media, which this request lacks: it is not computed but fails."""
    NO_TOKEN_IDS = "no_token_ids"  # noqa: S105 - no password
    """The prompt can still grow (streaming input)."""
    BAD_TOKEN_IDS = "bad_token_ids"  # noqa: S105 - no password
    """A token id of the prompt is not a whole number of 32 bits."""


@dataclass(frozen=True)
class RefusedParams:
    """Parameters that are not followed; ``detail`` is a sentence for the log, without any part of the prompt."""

    reason: RefusalReason
    detail: str
