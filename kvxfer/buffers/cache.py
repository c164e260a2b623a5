# SPDX-License-Identifier: Apache-2.0
"""The KV cache of an engine: its description and its memory."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvxfer.buffers.base import HostBuffer
from kvxfer.buffers.cache_regions import LayerPart, names_of, refuse_overlaps, regions_of
from kvxfer.errors import LayoutError
from kvxfer.layout.axes import Axes, Interval, KVLayout
from kvxfer.layout.dtypes import DTYPE_NBYTES
from kvxfer.layout.spec import CacheGroup, CacheSpec, Scale
from kvxfer.memory.arrays import allocations

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvxfer.buffers.base import DeviceBuffer
    from kvxfer.memory.arrays import ArrayView

_PAGE_NBYTES = 4096


class BufferMaker(Protocol):
    """A class of `DeviceBuffer`s that are made from arrays."""

    def view_of(self, array: Any, /) -> ArrayView:
        """Shape and address of an array, as `DeviceBuffer.view_of`."""

    def __call__(self, *arrays: Any) -> DeviceBuffer:
        """Make the buffer of all these views of one allocation."""


class KVCache:
    """A `CacheSpec` together with the buffers that its regions lie in. Immutable; keeps the memory alive.

    Args:
        spec: its regions name their buffer by position in ``buffers``.
        buffers: one for each allocation.

    Raises:
        LayoutError: a region does not lie inside its buffer.
    """

    def __init__(self, spec: CacheSpec, buffers: Sequence[DeviceBuffer]) -> None:
        self.spec: CacheSpec = spec
        self.buffers: tuple[DeviceBuffer, ...] = tuple(buffers)
        for region in spec.regions:
            if region.buffer >= len(self.buffers):
                raise LayoutError(f"a region lies in buffer {region.buffer}, of which there are {len(self.buffers)}")
            memory = self.buffers[region.buffer].memory
            # On a device without addresses, those of regions count from the start of the buffer.
            low, high = (memory.address, memory.end) if memory else (0, self.buffers[region.buffer].nbytes)
            if region.address < low or region.end > high:
                raise LayoutError(
                    f"region [{region.address:#x}, {region.end:#x}) is not inside its buffer [{low:#x}, {high:#x})"
                )

    def __repr__(self) -> str:
        nbytes = sum(buffer.nbytes for buffer in self.buffers)
        return f"KVCache({len(self.spec.regions)} regions in {len(self.buffers)} buffers of {nbytes} bytes)"

    @classmethod
    def from_layers(
        cls,
        layers: Mapping[str, Any],
        *,
        block_tokens: int | Mapping[str, int] | None = None,
        components: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        kinds: Mapping[str, str] | None = None,
        heads_total: int | Mapping[str, int] | None = None,
        head_start: int | Mapping[str, int] = 0,
        layer_start: int = 0,
        layers_total: int | None = None,
        scales: Mapping[str, Mapping[str, Any]] | None = None,
        name_layers: bool = False,
        fingerprint: str = "",
        dtype: str | None = None,
        rank: int = 0,
        world: int = 1,
        buffers: BufferMaker = HostBuffer,
    ) -> KVCache:
        """Describe the arrays of an engine; nothing is copied.

        Orders, padding and allocations are read from addresses and strides. A layer that is the same memory as an
        earlier one of its group (layers that share their KV) is left out.

        Args:
            layers: for each layer's name a writable array, seen as ``[block, head, token, content]``
                whatever its strides, or several of them, one per component. A layer's number is the only number among
                the dotted parts of its name (``model.layers.7.attn``) if all names have one and no two the same;
                otherwise, and where ``name_layers`` and a number between two of them is missing, its position in the
                mapping after ``layer_start``.
            block_tokens: tokens of a block of the block table, of all groups or of each by its name, if it differs from the
                arrays' blocks: a multiple of them where a kernel's blocks are smaller, anything for the state of
                state-space layers.
            components: what the arrays of a layer hold, of all groups or of each by its name; by default ``("kv",)`` for one
                array and ``("k", "v")`` for two.
            groups: names of the layers that share a block table, by name of the group; by default one group, ``"0"``.
            kinds: kinds of groups that are not ``full_attention``.
            heads_total: KV heads of the model, of all groups or of each by its name; by default no more than this rank holds.
            head_start: the first KV head of this rank, likewise.
            layer_start: the first layer of this rank, where names do not number themselves.
            layers_total: layers of the model; by default no more than this rank holds.
            scales: of quantised layers: for a layer's name and a component (``k`` and ``v`` also where an array holds
                both, half each) one factor, or one for each head of this rank; see `Scale`.
            name_layers: the names of ``layers`` are those of the model, and a peer that has them too matches layers by
                name, whatever their numbers.
            fingerprint: of everything outside the layout that must be equal, see `CacheSpec`.
            rank: this rank.
            world: number of ranks.
            dtype: element type, if the arrays have another of storage (bytes or integers that stand for bfloat16).
            buffers: class of the buffers of the device that the arrays are on; called with the views of one allocation.

        Raises:
            LayoutError: the arrays do not make a cache.
            UnsupportedBufferError: an array cannot be used, see `HostBuffer`.
        """
        _mapping("layers", layers, "an array, or a list of them, for each layer's name")
        for name in layers:
            if not isinstance(name, str):
                raise LayoutError(f"the name of a layer is a string, not {name!r:.80}")
        if not layers:
            raise LayoutError("a cache has at least one layer")
        tokens_of = _ByGroup("block_tokens", block_tokens)
        total_of = _ByGroup("heads_total", heads_total)
        start_of = _ByGroup("head_start", head_start, optional=False)
        layers_total = None if layers_total is None else _whole("layers_total", layers_total)
        layer_start = _whole("layer_start", layer_start)
        rank, world = _whole("rank", rank), _whole("world", world)
        kinds = {} if kinds is None else _mapping("kinds", kinds, "a kind for each group's name")
        scales = {} if scales is None else _mapping("scales", scales, "factors by component for each layer's name")
        for name, factors in scales.items():
            _mapping(f"the scales of layer {name!r}", factors, "factors for each component")
        if groups is None:
            groups = {"0": list(layers)}
        groups = _mapping("groups", groups, "names of layers for each group's name")
        if sorted(str(name) for names in groups.values() for name in names) != sorted(layers):
            raise LayoutError("the groups do not name each layer once")
        for each in (tokens_of, total_of, start_of):
            each.check(groups)
        components_of = _components_of(components, groups)
        views = {name: _views_of(name, arrays, components_of.get(name), buffers) for name, arrays in layers.items()}
        flat = [view for parts in views.values() for view in parts.values()]
        numbers = _layer_numbers(list(layers), layer_start, gaps=not name_layers)
        placed = dict(zip(map(id, flat), allocations(flat), strict=True))
        in_buffer: dict[int, list[ArrayView]] = {}
        for view in flat:
            in_buffer.setdefault(placed[id(view)], []).append(view)
        made_buffers = [buffers(*in_buffer[number]) for number in sorted(in_buffer)]
        bases = [_base(made_buffers[number], in_buffer[number]) for number in sorted(in_buffer)]
        if not kinds.keys() <= groups.keys():
            unknown = min(kinds.keys() - groups.keys(), key=str)
            raise LayoutError(f"there is no group {unknown!r} to be {kinds[unknown]!r}: there are {names_of(groups)}")
        made = []
        for group_name, names in groups.items():
            parts = [
                LayerPart(component, numbers[name], view, placed[id(view)], bases[placed[id(view)]])
                for name in names
                for component, view in views[name].items()
            ]
            if not parts:
                raise LayoutError(f"group {group_name!r} has no layers")
            extents = parts[0].extents
            kind = kinds.get(group_name, "mla" if parts[0].component == "latent" else "full_attention")
            start = start_of.get(group_name, 0)
            stop = start + extents.head
            tokens = tokens_of.get(group_name, extents.token)
            kernel_blocks = 1 if kind == "state" else max(1, tokens // extents.token)
            regions = tuple(regions_of(parts))
            refuse_overlaps(group_name, regions)
            present = {layer for region in regions for layer in region.layers}
            made.append(
                CacheGroup(
                    name=group_name,
                    kind=kind,
                    block_tokens=tokens,
                    num_blocks=extents.block // kernel_blocks,
                    heads=Interval(start, stop, total_of.get(group_name, stop)),
                    regions=regions,
                    scales=tuple(_scales({n: numbers[n] for n in names if numbers[n] in present}, scales)),
                )
            )
        if not scales.keys() <= layers.keys():
            raise LayoutError(f"there is no layer {min(scales.keys() - layers.keys(), key=str)!r} to have a scale")
        first, last = min(numbers.values()), max(numbers.values())
        spec = CacheSpec(
            groups=tuple(made),
            dtype=_one_dtype(flat) if dtype is None else dtype,
            layers=Interval(first, last + 1, last + 1 if layers_total is None else layers_total),
            fingerprint=fingerprint,
            rank=rank,
            world=world,
            layer_names=tuple(sorted(layers, key=lambda name: numbers[name])) if name_layers else (),
        )
        return cls(spec, made_buffers)

    @classmethod
    def allocate(
        cls,
        layout: KVLayout | str = KVLayout.LBHNC,
        *,
        layers: int,
        blocks: int,
        heads: int,
        block_tokens: int,
        head_dim: int,
        dtype: str = "bfloat16",
        apart: bool = False,
        padding: Axes | None = None,
        fingerprint: str = "",
    ) -> tuple[KVCache, dict[str, npt.NDArray[Any]]]:
        """A cache in fresh, zeroed, page-aligned host memory, for tests, benchmarks and demos.

        Args:
            layout: order of the axes.
            layers: number of layers.
            blocks: number of blocks.
            heads: number of KV heads.
            block_tokens: tokens of a block.
            head_dim: elements of K, and of V, of one token of one head.
            dtype: element type; where NumPy lacks it, the array has unsigned integers of that size.
            apart: K and V in an allocation each, instead of side by side in one.
            padding: bytes left unused after each layer, block, head and token.
            fingerprint: see `CacheSpec`.

        Returns:
            the cache, and the logical array ``[layer, block, head, token, content]`` of each component: of ``"kv"``,
            or of ``"k"`` and ``"v"``.

        Raises:
            LayoutError: extents that make no cache, or an unknown layout or dtype.
        """
        if dtype not in DTYPE_NBYTES:
            raise LayoutError(f"unknown dtype {dtype!r}: known are {', '.join(DTYPE_NBYTES)}")
        layers, blocks, heads = _whole("layers", layers), _whole("blocks", blocks), _whole("heads", heads)
        block_tokens, head_dim = _whole("block_tokens", block_tokens), _whole("head_dim", head_dim)
        order = layout if isinstance(layout, KVLayout) else KVLayout.parse(layout)
        extents = Axes(layers, blocks, heads, block_tokens)
        content = {"k": head_dim, "v": head_dim} if apart else {"kv": 2 * head_dim}
        arrays = {name: _zeros(order, extents, elements, dtype, padding) for name, elements in content.items()}
        by_layer = {f"layers.{i}": [array[i] for array in arrays.values()] for i in range(layers)}
        return cls.from_layers(by_layer, fingerprint=fingerprint, dtype=dtype), arrays


def _whole(what: str, value: Any) -> int:
    """An integer of any library, as an int. Raises LayoutError."""
    try:
        if not isinstance(value, (bool, np.bool_)):
            return index(value)
    except TypeError:
        pass
    raise LayoutError(f"{what} is no whole number: {value!r:.80}")


class _ByGroup:
    """A whole number for all groups, or for each by its name."""

    def __init__(self, what: str, value: int | Mapping[str, int] | None, *, optional: bool = True) -> None:
        self._what = what
        self._all: int | None = None
        self._each: dict[str, int] = {}
        if isinstance(value, Mapping):
            self._each = {name: _whole(f"{what} of group {name!r}", number) for name, number in value.items()}
        elif value is not None or not optional:
            self._all = _whole(what, value)

    def check(self, groups: Mapping[str, object]) -> None:
        """Raise LayoutError if a number is for a group that does not exist."""
        if not self._each.keys() <= groups.keys():
            unknown = min(self._each.keys() - groups.keys(), key=str)
            raise LayoutError(f"there is no group {unknown!r} to have {self._what}: there are {names_of(groups)}")

    def get(self, group: str, default: int) -> int:
        """Number of a group, or the default if none was given for it."""
        return self._each.get(group, default if self._all is None else self._all)


def _components_of(
    components: Sequence[str] | Mapping[str, Sequence[str]] | None, groups: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """Components by layer, where they were given."""
    if components is None:
        return {}
    found = {}
    for group, names in groups.items():
        given = components.get(group) if isinstance(components, Mapping) else components
        if given is not None:
            found.update(dict.fromkeys(names, given))
    return found


def _mapping(what: str, value: Any, of: str) -> Any:
    """``value``, if it is a mapping. Raises LayoutError."""
    if not isinstance(value, Mapping):
        raise LayoutError(f"{what} must be a mapping ({of}), not {type(value).__name__}")
    return value


def _base(buffer: DeviceBuffer, views: Sequence[ArrayView]) -> int:
    """The origin of the addresses of regions: 0, or the first byte of a buffer whose memory has no address."""
    return 0 if buffer.memory is not None else min(view.address for view in views)


def _views_of(name: str, arrays: Any, components: Sequence[str] | None, buffers: BufferMaker) -> dict[str, ArrayView]:
    parts = list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]
    if components is None:
        components = {1: ("kv",), 2: ("k", "v")}.get(len(parts), ())
    if len(parts) != len(components) or not parts:
        raise LayoutError(f"layer {name!r} has {len(parts)} arrays for {len(components)} components")
    views = [buffers.view_of(part) for part in parts]
    for view in views:
        if len(view.shape) != 4:
            raise LayoutError(f"layer {name!r} has shape {view.shape}, not [blocks, heads, tokens, content]")
    return dict(zip(components, views, strict=True))


def _layer_numbers(names: list[str], start: int, *, gaps: bool) -> dict[str, int]:
    """Number of each layer. Unless there may be ``gaps``, the numbers follow each other."""
    found = {name: [int(part) for part in name.split(".") if part.isdecimal()] for name in names}
    if all(len(numbers) == 1 for numbers in found.values()):
        single = {name: numbers[0] for name, numbers in found.items()}
        distinct = set(single.values())
        if len(distinct) == len(single) and (gaps or max(distinct) + 1 - min(distinct) == len(single)):
            return single
    return {name: start + position for position, name in enumerate(names)}


def _scales(numbers: Mapping[str, int], scales: Mapping[str, Mapping[str, Any]]) -> Iterable[Scale]:
    for name, number in numbers.items():
        for component, factors in scales.get(name, {}).items():
            try:
                flat = np.atleast_1d(np.asarray(factors, dtype=np.float64))
            except (TypeError, ValueError) as error:
                raise LayoutError(f"the scale of {component!r} of layer {name!r} is no number: {error}") from error
            yield Scale(component, number, tuple(flat.ravel().tolist()))


def _one_dtype(views: Iterable[ArrayView]) -> str:
    names = sorted({view.dtype for view in views})
    if len(names) > 1:
        raise LayoutError(f"the arrays have different dtypes: {', '.join(names)}")
    return names[0]


def _zeros(order: KVLayout, extents: Axes, elements: int, dtype: str, padding: Axes | None) -> npt.NDArray[Any]:
    """A logical array [layer, block, head, token, content] whose memory is in ``order``."""
    itemsize = DTYPE_NBYTES[dtype]
    if min(*(getattr(extents, axis) for axis in Axes.__struct_fields__), elements) < 1:
        raise LayoutError("every extent of a cache is at least 1")
    strides = order.strides(extents, elements * itemsize, padding=padding)
    outermost = order.axes[0]
    nbytes = int(getattr(strides, outermost) * getattr(extents, outermost))
    try:
        memory = np.zeros(nbytes + _PAGE_NBYTES, dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        raise LayoutError(f"there is no memory for a cache of {nbytes / (1 << 30):,.1f} GiB: {error}") from error
    shape = (extents.layer, extents.block, extents.head, extents.token, elements)
    steps = (strides.layer, strides.block, strides.head, strides.token, itemsize)
    # Not np.dtype(dtype): whether NumPy knows bfloat16 depends on an import of ml_dtypes.
    storage = np.dtype(f"u{itemsize}" if dtype.startswith(("bfloat", "float8")) else dtype)
    offset = -memory.ctypes.data % _PAGE_NBYTES
    array: npt.NDArray[Any] = np.ndarray(shape, storage, buffer=memory, offset=offset, strides=steps)
    return array
