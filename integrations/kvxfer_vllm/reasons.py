# SPDX-License-Identifier: Apache-2.0
"""Why a request's ``kv_transfer_params`` were not followed: the ``reason`` label of ``vllm:kvxfer_refused_params``."""

from __future__ import annotations

import enum


class Refusal(str, enum.Enum):
    """One word per reason. The request is computed locally, as if it had come without parameters."""

    NOT_AN_OBJECT = "not_an_object"
    """``kv_transfer_params`` is not a JSON object."""
    BAD_FLAG = "bad_flag"
    """``do_remote_prefill`` or ``do_remote_decode`` is neither a boolean nor null."""
    BOTH_FLAGS = "both_flags"
    """Both flags are set: a request cannot be prefilled elsewhere and for elsewhere at once in pull mode."""
    NOT_A_PRODUCER = "not_a_producer"
    """``do_remote_decode`` on a server whose ``kv_role`` is ``kv_consumer``."""
    NOT_A_CONSUMER = "not_a_consumer"
    """``do_remote_prefill`` on a server whose ``kv_role`` is ``kv_producer``."""
    NO_LEASE = "no_lease"
    """The key ``kvxfer`` is missing: the producer was not kvxfer, or the client made the parameters up."""
    BAD_LEASE = "bad_lease"
    """The key ``kvxfer`` does not hold a lease."""
    MISSING_KEY = "missing_key"
    """One of NixlConnector's keys is missing."""
    BAD_TYPE = "bad_type"
    """One of NixlConnector's keys has a wrong type or an impossible value."""
    BAD_BLOCKS = "bad_blocks"
    """``remote_block_ids`` is no list of block ids, or has more of them than the prompt has tokens."""
    CONTRADICTION = "contradiction"
    """The lease and NixlConnector's keys speak of different engines, requests, ranks or token counts."""
    OTHER_MODE = "other_mode"
    """The request was sent to both servers at once, or its producer pushes, and this server has ``"mode": "pull"``."""
    OWN_ENGINE = "own_engine"
    """The lease is this server's own, or the prefill server that is named is this one."""
    OTHER_PROMPT = "other_prompt"
    """The lease is for another prompt than the one that came with it."""
    LEASE_USED = "lease_used"
    """Another request on this server has, or had, the same lease (``n`` > 1, several prompts in one call, a replay)."""
    NO_TOKEN_IDS = "no_token_ids"  # noqa: S105 - no password
    """The prompt has no token ids (embeddings) or can still grow (streaming input)."""
    BAD_TOKEN_IDS = "bad_token_ids"  # noqa: S105 - no password
    """A token id of the prompt needs more than 32 bits, or is no whole number."""
