# SPDX-License-Identifier: Apache-2.0
"""Fingerprint of a model of transformers, which servers of other engines compute alike.

A model is taken for the checkpoint that it was loaded from if a sample of its weights is that of the checkpoint. One that was changed
since then, or that was made here, is known by a sample of its weights in memory: to engines of transformers only.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from huggingface_hub import snapshot_download

from kvxfer_serving.checkpoint import Checkpoint
from kvxfer_serving.model_identity import ServedModel, fingerprint_of

if TYPE_CHECKING:
    from kvxfer_serving.checkpoint import StoredTensor

_SAMPLED: Final = 64
"""Elements of each weight that are looked at."""
_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that are compared with the checkpoint, by the names of safetensors."""


def model_fingerprint(model: Any, override: str = "") -> str:
    """Fingerprint of a model: the path that it was loaded from is no part of it.

    Args:
        model: of transformers.
        override: replaces what is computed, except for the dtype.

    Raises:
        ConfigError: the checkpoint cannot be read.
    """
    config = model.config
    name = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "")
    place = _place(name) if not override else None
    checkpoint = Checkpoint.of(place) if place is not None else None
    is_stored = checkpoint is not None and _is_of(model, checkpoint)
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return fingerprint_of(
        ServedModel(
            engine="transformers",
            name=name or type(model).__name__,
            place=place,
            unread="" if is_stored or override else f"memory {_memory_digest(model)}",
            is_stored=is_stored,
            config=config.to_dict(),
            text_config=config.get_text_config().to_dict(),
            dtype=str(model.dtype),
            quantization=str(getattr(method, "value", method) or ""),
        ),
        override,
    )


def _place(name: str) -> Path | None:
    """Folder of a checkpoint: its path, or where it was downloaded to."""
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # the errors of huggingface_hub, without its network
        return None


def _is_of(model: Any, checkpoint: Checkpoint) -> bool:
    """Whether the weights of a model that have their names in the checkpoint, of which there are some, are those of the checkpoint."""
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    compared = 0
    for name, weight in model.state_dict().items():
        tensor = stored.get(name)
        if tensor is None or tensor.shape != tuple(weight.shape) or tensor.dtype not in _DTYPES or not weight.numel():
            continue
        if not weight.is_floating_point() or not weight.is_contiguous() or weight.device.type == "meta":
            continue
        at = max(0, (weight.numel() - _SAMPLED) // 2)
        here = weight.detach().view(-1)[at : at + _SAMPLED].cpu()
        if not torch.equal(_read(tensor, at, here.numel()).to(here.dtype), here):
            return False
        compared += 1
    return compared > 0


def _read(tensor: StoredTensor, at: int, count: int) -> torch.Tensor:
    """Elements of a stored tensor from ``at`` on."""
    dtype = _DTYPES[tensor.dtype]
    with tensor.path.open("rb") as file:
        data = os.pread(file.fileno(), count * dtype.itemsize, tensor.offset + at * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _memory_digest(model: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
