# SPDX-License-Identifier: Apache-2.0
"""Choice of who moves the bytes of a read: the consumer by READ, or the producer by WRITE.

A READ needs nothing of the producer's process, so it is what is taken where it does no harm. Where the link ties the fates of both
(`LinkFacts.fate_shared`), or the engine has no READ, the producer writes. It may write only where the consumer's agent cuts it off when it
is closed (`LinkFacts.cut_off_by_close`): a producer that was given up could otherwise write into blocks that belong to another request.
Where both are safe, it writes if that was measured to be clearly faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvxfer.agents.capabilities import Op
from kvxfer.config import MoveBy
from kvxfer.errors import IncompatibleError

if TYPE_CHECKING:
    from kvxfer.agents.capabilities import Capabilities, LinkFacts


WORTH = 1.25
"""Least `Costs.write_gain` with which the producer writes although a READ would do: a WRITE needs its process."""


class Direction(NamedTuple):
    """Operation by which the bytes of one source are moved, and the reason."""

    op: Op
    why: str


def choose(
    move_by: MoveBy, capabilities: Capabilities, link: LinkFacts, *, producer_writes: bool, write_gain: float = 1.0
) -> Direction:
    """Choose for one source.

    Args:
        move_by: what is wanted.
        capabilities: of this side's agent.
        link: between that agent and the producer's.
        producer_writes: the producer says that it can.
        write_gain: see `kvxfer.planner.costs.Costs`.

    Raises:
        IncompatibleError: what is wanted, or all that is left, is not possible here.
    """
    obstacle = ""
    if not producer_writes:
        obstacle = "the producer's transfer agent or version of kvxfer does not write"
    elif not link.cut_off_by_close:
        obstacle = "on this link a producer that was given up could not be stopped from writing"
    forced = ""
    if move_by is MoveBy.WRITE:
        forced = "move_by=write"
    elif Op.READ not in capabilities.ops:
        forced = "this side's transfer agent does not read"
    if forced and obstacle:
        raise IncompatibleError("move_by", f"{forced}, and {obstacle}")
    if forced:
        return Direction(Op.WRITE, forced)
    if move_by is MoveBy.READ:
        return Direction(Op.READ, "move_by=read")
    if link.fate_shared and not obstacle:
        return Direction(Op.WRITE, "a reader that ends could take its producer along on this link")
    if write_gain >= WORTH and not obstacle:
        return Direction(Op.WRITE, f"it was measured to be {write_gain:.1f} times as fast (KVXFER_COSTS)")
    return Direction(Op.READ, obstacle or "a read needs nothing of the producer's process")
