# SPDX-License-Identifier: Apache-2.0
"""Identity of a checkpoint by its content: what its files are called, where they lie, and how tensors are divided among them do not count.

Of each tensor the name, dtype, shape and a sample of its bytes count. All bytes of 100 GB would take minutes; the samples take a
second. Two checkpoints that differ in bytes between the samples only are taken for equal: one of which single rows were changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_OTHER_WEIGHTS: Final = ("*.gguf", "*.bin", "*.pt", "*.pth")
_NOT_OF_THE_MODEL: Final = ("adapter_model.safetensors",)
_SAMPLE_NBYTES: Final = 4096
_MOST_SAMPLES: Final = 8
"""Most samples of a tensor; fewer where there are many tensors."""
_MOST_OF_FILE: Final = 1024
"""Most samples of a file whose tensors are not known."""
_SAMPLES: Final = 16_384
"""Samples of all tensors together, but for the one that each has."""
_READERS: Final = 8
_MOST_HEADER_NBYTES: Final = 100_000_000  # the limit of the library safetensors


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``nbytes`` at ``offset``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """Files of a model's weights.

    Attributes:
        tensors: of the safetensors files; empty for other files.
        others: files of another format, if there are no safetensors.
    """

    tensors: tuple[StoredTensor, ...]
    others: tuple[Path, ...] = ()

    @classmethod
    def of(cls, place: Path) -> Checkpoint | None:
        """Find the checkpoint in a folder, or of a single file; None if it has no weights, or not all of them.

        Raises:
            ConfigError: a file is not what its name says.
        """
        if place.is_file():
            return cls((), (place,))
        files, names = _safetensors_of(place)
        if not all(path.is_file() for path in files):
            return None
        tensors = tuple(each for path in files for each in _header(path) if names is None or each.name in names)
        others = tuple(path for glob in _OTHER_WEIGHTS for path in place.glob(glob)) if not tensors else ()
        return cls(tensors, others) if tensors or others else None

    def digest(self) -> str:
        """Digest in 16 hex digits, with the kind of the files in front. Reads samples of all tensors.

        Raises:
            ConfigError: a file cannot be read.
        """
        kind = "safetensors" if self.tensors else "files"
        parts = self.tensors or tuple(
            StoredTensor("", "", (), path, 0, path.stat().st_size) for path in sorted(self.others)
        )
        most = _MOST_SAMPLES if self.tensors else _MOST_OF_FILE
        samples = min(most, max(1, _SAMPLES // len(parts)))
        by_file: dict[Path, list[StoredTensor]] = {}
        for part in parts:
            by_file.setdefault(part.path, []).append(part)
        # Several at a time: from a disk or over a network, waiting takes longer than computing.
        pieces = [(path, own[i::_READERS]) for path, own in by_file.items() for i in range(_READERS)]
        try:
            with ThreadPoolExecutor(_READERS) as readers:
                found = [
                    each
                    for some in readers.map(lambda piece: _digests(piece[0], piece[1], samples), pieces)
                    for each in some
                ]
        except OSError as error:
            raise ConfigError(f"cannot read the weights of the model: {error}") from error
        whole = hashlib.blake2b(digest_size=8)
        for each in sorted(found):
            whole.update(each)
        return f"{kind} {whole.hexdigest()}"


def stored_config(place: Path) -> dict[str, Any]:
    """Content of ``config.json`` in a folder, or beside a file; empty if there is none. Raises ConfigError: it is no JSON object."""
    path = (place if place.is_dir() else place.parent) / "config.json"
    return _read_json(path) if path.is_file() else {}


def _safetensors_of(folder: Path) -> tuple[list[Path], frozenset[str] | None]:
    """Files to read, and names of the tensors in them that belong to the model; None: all."""
    index = folder / _INDEX
    if index.is_file():
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ConfigError(f"{index} has no weight_map with the names of files")
        return [folder / name for name in sorted(set(files.values()))], frozenset(files)
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE], None
    return sorted(path for path in folder.glob("*.safetensors") if path.name not in _NOT_OF_THE_MODEL), None


def _header(path: Path) -> list[StoredTensor]:
    """Tensors of a safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _MOST_HEADER_NBYTES:
                raise ValueError(f"a header of {length} bytes")
            described = json.loads(file.read(length))
        made = []
        for name, fields in described.items():
            if name != "__metadata__":
                begin, end = fields["data_offsets"]
                shape = tuple(int(extent) for extent in fields["shape"])
                made.append(StoredTensor(name, str(fields["dtype"]), shape, path, 8 + length + begin, end - begin))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no safetensors file that can be read: {error!r}") from error
    return made


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no JSON object")
    return found


def sample_offsets(nbytes: int, samples: int) -> list[tuple[int, int]]:
    """Begin and length of the samples of so many bytes, at equal distances; all bytes where they are few."""
    if nbytes <= samples * _SAMPLE_NBYTES:
        return [(0, nbytes)]
    room = nbytes - _SAMPLE_NBYTES
    return [(room * (2 * i + 1) // (2 * samples), _SAMPLE_NBYTES) for i in range(samples)]


def _digests(path: Path, parts: Sequence[StoredTensor], samples: int) -> list[bytes]:
    """Digest of each of these tensors of a file."""
    found = []
    with path.open("rb") as file:
        for part in parts:
            digest = hashlib.blake2b(repr((part.name, part.dtype, part.shape, part.nbytes)).encode(), digest_size=16)
            for begin, length in sample_offsets(part.nbytes, samples):
                piece = os.pread(file.fileno(), length, part.offset + begin)
                if len(piece) != length:
                    raise OSError(f"{part.path} ends within {part.name or 'its weights'}")
                digest.update(piece)
            found.append(digest.digest())
    return found
