# SPDX-License-Identifier: Apache-2.0
"""States of vLLM's state-space layers (Mamba 1 and 2, gated delta nets, short convolutions) as kvxfer's groups describe them.

vLLM keeps a layer's states (that of its convolution, then the recurrent one) together in one page of a block, and the rest of
the page is padding. A state has no tokens: it is copied as a whole, as opaque bytes. Tensor parallelism divides the channels of
a convolution and the heads of a recurrent state. If vLLM stores a convolution channel by channel
(``VLLM_SSM_CONV_STATE_LAYOUT=DS``), each rank's share is contiguous, and servers with different tensor parallelism can exchange
states; else a page is one part, which only a server with the same tensor parallelism and layout takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import MambaSpec

_GROUPS_OF_MAMBA_2 = ("n_groups", "mamba_n_groups", "mamba_ngroups")
"""Names under which models' configurations have the number of groups that share B and C."""


@dataclass(frozen=True)
class StatePart:
    """Part of each page that tensor parallelism divides evenly.

    Attributes:
        name: of the part, with all that must be equal on two servers; parts with the same name hold the same numbers.
        offset: bytes from the beginning of a page.
        rows: channels or heads of this rank.
        row_nbytes: bytes of one of them.
        rows_total: rows of the model; of a part that every rank has in full, as many as ``rows``.
    """

    name: str
    offset: int
    rows: int
    row_nbytes: int
    rows_total: int

    @property
    def end(self) -> int:
        """Bytes from the beginning of a page to the end of this part."""
        return self.offset + self.rows * self.row_nbytes

    def view(self, pages: torch.Tensor) -> torch.Tensor:
        """View ``[block, row, 1, byte]`` of this part in vLLM's pages ``[block, 1, 1, byte]``."""
        shape = (pages.shape[0], self.rows, 1, self.row_nbytes)
        strides = (pages.stride(0), self.row_nbytes, self.row_nbytes, 1)
        return torch.as_strided(pages, shape, strides, pages.storage_offset() + self.offset)


@dataclass(frozen=True)
class StateLayout:
    """Facts about this server that the bytes of a state depend on.

    Attributes:
        dim_first: whether a convolution's state is stored channel by channel (DS) or position by position (SD).
        tp_size: tensor parallel size.
        shares_groups: whether Mamba 2 layers have one group of B and C, of which each rank has a copy.
        device: device type by vLLM's name.
    """

    dim_first: bool = False
    tp_size: int = 1
    shares_groups: bool = False
    device: str = "cpu"

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> StateLayout:
        """Find the layout of this process."""
        from vllm.model_executor.layers.mamba.mamba_utils import (  # noqa: PLC0415 - imports models' layers
            is_conv_state_dim_first,
        )

        model: Any = vllm_config.model_config.hf_text_config
        numbers = [getattr(model, name, None) for name in _GROUPS_OF_MAMBA_2]
        return cls(
            dim_first=bool(is_conv_state_dim_first()),
            tp_size=vllm_config.parallel_config.tensor_parallel_size,
            shares_groups=1 in numbers,
            device=vllm_config.device_config.device_type,
        )

    def parts(self, spec: MambaSpec) -> list[StatePart]:
        """Divide the pages of a layer into parts that a server with another tensor parallel size can find, or into one."""
        kind, sizes = _kind(spec), [dtype.itemsize for dtype in spec.dtypes]
        copied = bool(getattr(spec, "tp_replicated", False))
        sections = _sections(kind, spec.shapes) if self.dim_first and not copied else None
        if sections is None:
            order = "ds" if self.dim_first else "sd"
            dtypes = "-".join(_short(dtype) for dtype in spec.dtypes)
            nbytes = sum(prod(shape) * size for shape, size in zip(spec.shapes, sizes, strict=True))
            name = f"state-{kind}-{order}-{dtypes}{self._of_device(kind)}"
            return [StatePart(name, 0, 1, nbytes, 1 if copied else self.tp_size)]
        return list(self._divided(kind, sections, spec.dtypes))

    def _divided(
        self, kind: str, sections: Sequence[tuple[str, int, int, int]], dtypes: Sequence[torch.dtype]
    ) -> Iterator[StatePart]:
        offset = 0
        for name, number, rows, elements in sections:
            nbytes = elements * dtypes[number].itemsize
            device = self._of_device(kind) if name == "heads" else ""
            total = rows if self.shares_groups and name in ("b", "c") else rows * self.tp_size
            yield StatePart(f"state-{kind}-{name}-{_short(dtypes[number])}{device}", offset, rows, nbytes, total)
            offset += rows * nbytes

    def _of_device(self, kind: str) -> str:
        """Mark of states that are stored otherwise on a CPU: vLLM's gated delta nets transpose their heads there."""
        return "-cpu" if kind == "gdn_attn" and self.device == "cpu" else ""


def _kind(spec: MambaSpec) -> str:
    """Name of a layer's kind: ``mamba1``, ``mamba2``, ``short_conv``, ``linear``, ``gdn_attn``."""
    kind: Any = spec.mamba_type  # a text before vLLM 0.32
    return str(getattr(kind, "name", kind)).lower()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sections(kind: str, shapes: Sequence[tuple[int, ...]]) -> list[tuple[str, int, int, int]] | None:
    """Sections of a page as (name, number of the state, rows, elements of a row); None if they are not known.

    The channels of a convolution come in sections that are divided one by one: those of Mamba 2 are x, B and C, those of gated
    delta nets q, k and v. The last of two states has heads, or the channels of Mamba 1.
    """
    if kind == "linear" and len(shapes) == 1:
        return [("heads", 0, shapes[0][0], prod(shapes[0][1:]))]
    channels, length = shapes[0][0], prod(shapes[0][1:])
    if kind == "short_conv" and len(shapes) == 1:
        return [("x", 0, channels, length)]
    if len(shapes) != 2:
        return None
    heads = ("heads", 1, shapes[1][0], prod(shapes[1][1:]))
    if kind == "mamba1":
        return [("x", 0, channels, length), heads]
    inner = prod(shapes[1][:2])  # heads times their width: the channels of x, or of v
    rest = (channels - inner) // 2
    if kind not in ("mamba2", "gdn_attn") or rest <= 0 or inner + 2 * rest != channels:
        return None
    rows = {"x": inner, "b": rest, "c": rest} if kind == "mamba2" else {"q": rest, "k": rest, "v": inner}
    return [*((name, 0, number, length) for name, number in rows.items()), heads]
