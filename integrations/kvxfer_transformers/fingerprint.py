# SPDX-License-Identifier: Apache-2.0
"""Identity of a model: equal for two engines exactly if KV of one means the same to the other.

Two engines of transformers compute it of the configuration and the weights. An engine of another kind computes the same where both
are told a name for the model. K is kept after rotation in either. Layers with sliding windows are excepted: transformers overwrites
the oldest tokens of a window's first block, and vLLM would take that block for a prefix that it has.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import torch

_SAMPLED: Final = 64
"""Elements of each weight that the identity depends on, at equal distances: all of a checkpoint would take minutes."""

_NO_PART: Final = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of a configuration that KV does not depend on."""


def model_fingerprint(model: Any, override: str = "", *, windows: bool = False) -> str:
    """Digest of a model's configuration, dtype, and a sample of each of its weights; its name and path are no part of it.

    Args:
        model: of transformers.
        override: replaces the configuration and the weights, not the dtype.
        windows: some layers have sliding windows.
    """
    facts: dict[str, Any] = {"dtype": str(model.dtype)}
    if override:
        facts["model"] = override
    else:
        config = model.config.get_text_config().to_dict()
        facts["config"] = {name: value for name, value in config.items() if name not in _NO_PART}
        facts["weights"] = _weights_digest(model)
    text = json.dumps(facts, sort_keys=True, default=str)
    kind = "model" if override and not windows else "transformers"
    return f"{kind}:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _weights_digest(model: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
