# SPDX-License-Identifier: Apache-2.0
"""Which bytes of one cache belong at which place of another.

`plan` compares two specs and refuses, by name, what cannot be served; the algebra is in `kvxfer.segment`, the expansion
for given blocks in `kvxfer.binding`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvxfer.binding import BlockPairs, Nest, descriptors, nests_of
from kvxfer.blocks import per_group
from kvxfer.errors import IncompatibleError
from kvxfer.segment import Segment, content_sizes, fold, fuse, intersect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.layout import CacheSpec
    from kvxfer.memory import Descriptors


@dataclass(frozen=True)
class PlanExplanation:
    """What a plan does, for people; ``str()`` of it is a few readable lines.

    Attributes:
        block_nbytes: bytes that one block takes over the wire, for each group.
        segments: the loop nests.
        blocks: number of blocks bound, for each group; None if none were given.
        nbytes: bytes that these blocks take.
        descriptors_unmerged: runs before those of neighbouring blocks and layers were merged.
        descriptors: runs after merging.
    """

    block_nbytes: tuple[int, ...]
    segments: tuple[Segment, ...]
    blocks: tuple[int, ...] | None = None
    nbytes: int | None = None
    descriptors_unmerged: int | None = None
    descriptors: int | None = None

    def __str__(self) -> str:
        lines = []
        for group, nbytes in enumerate(self.block_nbytes):
            mine = [segment for segment in self.segments if segment.group == group]
            lines.append(f"group {group}: {nbytes:,} bytes per block in {sum(s.runs_per_block for s in mine):,} runs")
            counted: dict[str, int] = defaultdict(int)
            for segment in mine:
                counted[str(segment)] += 1
            lines += [f"  {count} x [{text}]" for text, count in counted.items()]
        if self.blocks is not None:
            lines.append(
                f"{sum(self.blocks):,} blocks: {self.nbytes:,} bytes in {self.descriptors:,} descriptors"
                f" ({self.descriptors_unmerged:,} before merging)"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class TransferPlan:
    """How blocks of ``source`` become blocks of ``target``. Made by `plan`; immutable, hashable, for any thread.

    Holds no addresses but those of the two specs, and no memory.
    """

    source: CacheSpec
    target: CacheSpec
    segments: tuple[Segment, ...]
    _nests: tuple[Nest, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_nests", tuple(nests_of(self.segments)))

    def nbytes(self, num_blocks: int | Sequence[int]) -> int:
        """Bytes that so many blocks take (of each group, if there are several)."""
        counts = [num_blocks] if isinstance(num_blocks, int) else list(num_blocks)
        return sum(count * nbytes for count, nbytes in zip(counts, self._block_nbytes, strict=True))

    def bind(self, source_blocks: Any, target_blocks: Any) -> Descriptors:
        """The runs to copy for these blocks: the i-th source block becomes the i-th target block.

        Args:
            source_blocks: integer block ids as a list or array: one for each group, in the order of the spec's groups.
                With one group, its list may be given bare.
            target_blocks: likewise, of the same lengths.

        Returns:
            descriptors whose local side is the target and whose remote side is the source. No two of them are adjacent
            on both sides within one allocation. Runs of one pair of allocations are in the order of the source's memory.

        Raises:
            BlockError: ids are no integers, out of range, repeated in the target, or of unequal number.
        """
        pairs = self._pairs(source_blocks, target_blocks)
        return descriptors(self._nests, pairs)

    def explain(self, source_blocks: Any = None, target_blocks: Any = None) -> PlanExplanation:
        """What would be copied; with blocks also how many descriptors it takes. Raises as `bind`."""
        explanation = PlanExplanation(self._block_nbytes, self.segments)
        if source_blocks is None:
            return explanation
        pairs = self._pairs(source_blocks, source_blocks if target_blocks is None else target_blocks)
        bound = self.bind(source_blocks, source_blocks if target_blocks is None else target_blocks)
        return replace(
            explanation,
            blocks=tuple(len(pair) for pair in pairs),
            nbytes=bound.total_nbytes,
            descriptors_unmerged=sum(s.runs_per_block * len(pairs[s.group]) for s in self.segments),
            descriptors=len(bound),
        )

    @property
    def _block_nbytes(self) -> tuple[int, ...]:
        nbytes = [0] * len(self.source.groups)
        for segment in self.segments:
            nbytes[segment.group] += segment.runs_per_block * segment.nbytes
        return tuple(nbytes)

    def _pairs(self, source_blocks: Any, target_blocks: Any) -> list[BlockPairs]:
        sources = per_group(self.source, source_blocks, "source")
        targets = per_group(self.target, target_blocks, "target")
        return [BlockPairs.of(source, target) for source, target in zip(sources, targets, strict=True)]


def plan(source: CacheSpec, target: CacheSpec) -> TransferPlan:
    """How to copy blocks of ``source`` to blocks of ``target``, in any order of axes and with any padding.

    Needs no device and no peer. Both must have the same logical shape: equal fingerprint, dtype, groups, tokens of a
    block, heads, layers and components. The number of blocks is each side's own affair.

    Raises:
        IncompatibleError: they differ; says in which axis, with both values.
    """
    _refuse_unequal(source, target)
    boxes = [
        segment
        for number, (a, b) in enumerate(zip(source.groups, target.groups, strict=True))
        for segment in intersect(number, a, b)
    ]
    return TransferPlan(source, target, tuple(fold(segment) for segment in fuse(boxes)))


def _refuse_unequal(source: CacheSpec, target: CacheSpec) -> None:
    _require_equal("fingerprint", repr(source.fingerprint), repr(target.fingerprint))
    _require_equal("dtype", source.dtype, target.dtype)
    _require_equal("layers", f"{source.layers.total} in the model", f"{target.layers.total} in the model")
    _require_equal("groups", _names(source), _names(target))
    for a, b in zip(source.groups, target.groups, strict=True):
        where = f" of group {a.name!r}" if len(source.groups) > 1 else ""
        _require_equal("kind", a.kind, b.kind, where)
        _require_equal("block_tokens", str(a.block_tokens), str(b.block_tokens), where)
        _require_equal("heads", str(a.heads), str(b.heads), where)
        _require_equal("layers", _ranges(a.layers), _ranges(b.layers), where)
        sizes, others = content_sizes(a), content_sizes(b)
        _require_equal("components", _components(sizes), _components(others), where)
        for layer, component in sorted(sizes.keys() | others.keys()):
            has, wants = sizes.get((layer, component), 0), others.get((layer, component), 0)
            what = f" of {component!r} of layer {layer}{where}"
            _require_equal("content", f"{has} bytes", f"{wants} bytes", what)


def _require_equal(axis: str, source: str, target: str, where: str = "") -> None:
    if source != target:
        raise IncompatibleError(axis, f"{axis}{where} must be equal: the source has {source}, the target has {target}")


def _names(spec: CacheSpec) -> str:
    return ", ".join(repr(group.name) for group in spec.groups)


def _components(sizes: dict[tuple[int, str], int]) -> str:
    return " and ".join(sorted({component for _, component in sizes}))


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as a person writes them: ``0-15, 20``."""
    begins = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(begins, ends, strict=True))
