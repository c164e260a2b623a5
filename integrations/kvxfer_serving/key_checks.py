# SPDX-License-Identifier: Apache-2.0
"""Checks of single keys of ``kv_transfer_params``: present, of the right type, and within bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvxfer.layout.checks import MAX_RANKS
from kvxfer_serving.refusals import RefusalReason, RefusedParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvxfer.protocol.lease_ref import LeaseRef

_MAX_BLOCK_ID = 2**31 - 1
_MAX_KEY = 256


def check_transfer_id(params: Mapping[str, Any]) -> RefusedParams | None:
    """Refuse a ``transfer_id`` that cannot be the key of a request; there need not be one."""
    key = params.get("transfer_id")
    if key is None or (isinstance(key, str) and 0 < len(key) <= _MAX_KEY and key.isprintable()):
        return None
    return RefusedParams(RefusalReason.BAD_TYPE, f"transfer_id is no string of 1 to {_MAX_KEY} printable characters")


def check_keys(params: Mapping[str, Any], types: Mapping[str, type]) -> RefusedParams | None:
    """Refuse parameters that lack one of these keys, or have another type there, or no port."""
    for name, kind in types.items():
        value = params.get(name)
        if value is None:
            return RefusedParams(RefusalReason.MISSING_KEY, f"{name} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            return RefusedParams(RefusalReason.BAD_TYPE, f"{name} is a {type(value).__name__}")
    if "remote_port" in types and not 0 < params["remote_port"] < 2**16:
        return RefusedParams(RefusalReason.BAD_TYPE, "remote_port is no port")
    return None


def check_sizes(params: Mapping[str, Any]) -> RefusedParams | None:
    """Refuse a producer with parallelism that is not supported, or that makes no sense."""
    if params.get("dcp_size", 1) != 1:
        return RefusedParams(RefusalReason.BAD_TYPE, "dcp_size is not 1")
    stages = params.get("pp_size", 1)
    if type(stages) is not int or not 0 < stages <= MAX_RANKS:
        return RefusedParams(RefusalReason.BAD_TYPE, "pp_size is no number of pipeline stages")
    return None


def check_blocks(groups: object, lease: LeaseRef, most: int) -> RefusedParams | None:
    """Refuse what is no list of block ids. A block has at least one token, which bounds the work for lists of any length."""
    if not isinstance(groups, (list, tuple)) or not 0 < len(groups) <= most:
        return RefusedParams(
            RefusalReason.BAD_BLOCKS, f"remote_block_ids is not a list of block ids for each of 1 to {most} groups"
        )
    if not any(groups):
        return RefusedParams(RefusalReason.BAD_BLOCKS, "remote_block_ids names no block")
    for blocks in groups:
        if not isinstance(blocks, (list, tuple)):
            return RefusedParams(RefusalReason.BAD_BLOCKS, "a group of remote_block_ids is no list of block ids")
        if len(blocks) > lease.num_tokens:
            return RefusedParams(RefusalReason.BAD_BLOCKS, f"{len(blocks)} block ids for {lease.num_tokens} tokens")
        if not all(type(block) is int and 0 <= block <= _MAX_BLOCK_ID for block in blocks):
            return RefusedParams(RefusalReason.BAD_BLOCKS, "remote_block_ids holds something that is no block id")
    return None
