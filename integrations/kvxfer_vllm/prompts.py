# SPDX-License-Identifier: Apache-2.0
"""Identity of a prompt of vLLM, with its adapter, images and other media.

The two servers may know adapters and images by different names, so their content counts, where vLLM has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvxfer_serving.prompt_digests import joined_digest, prompt_digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.*", "new_embeddings.*")
_NAMES_IN_CONFIG = ("base_model_name_or_path", "revision", "inference_mode")
_PIECE_NBYTES = 1 << 22


class PromptIdentity:
    """Digests of requests' prompts.

    Args:
        media_by_content: vLLM names images and other media after the request, so their tensors are hashed instead.

    Attributes:
        weights: version of this server's weights, as their trainer names it; empty for those of the checkpoint.
    """

    def __init__(self, *, media_by_content: bool = False) -> None:
        self.weights = ""
        self._media_by_content = media_by_content
        self._adapters: dict[str, tuple[object, str]] = {}
        """State of the files and digest of each LoRA adapter, by path."""

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> PromptIdentity:
        """Make the identities of a server's prompts."""
        media = vllm_config.model_config.multimodal_config
        no_caches = media is not None and media.mm_processor_cache_gb == 0
        return cls(media_by_content=no_caches and not vllm_config.cache_config.enable_prefix_caching)

    def digest(self, request: Request, num_tokens: int) -> str:
        """Digest of a request's first ``num_tokens`` tokens, see `kvxfer_serving.prompt_digests`.

        Raises:
            TokenIdError: a token id is not a whole number of 32 bits.
        """
        tokens = request.prompt_token_ids or ()
        if num_tokens > request.num_prompt_tokens:
            tokens = request.all_token_ids  # of a turn that has ended: prompt and answer
        tokens = tokens[:num_tokens]
        embeds = request.prompt_embeds
        context = {
            "adapter": self._adapter(request.lora_request) if request.lora_request else None,
            "cache_salt": request.cache_salt,
            "embeds": _tensor_digest(embeds[:num_tokens]) if embeds is not None else None,
        }
        media = [self._medium(item) for item in request.mm_features if item.mm_position.offset < num_tokens]
        digest = prompt_digest(tokens, **context)
        with_media = prompt_digest(tokens, media=media, **context) if media else ""
        return joined_digest(digest, with_media=with_media, num_media=len(media), weights=self.weights)

    def _medium(self, item: MultiModalFeatureSpec) -> tuple[str, int]:
        """(name of the content, first token) of an image, a sound, ..."""
        name = item.mm_hash or item.identifier
        if self._media_by_content and item.data is not None:
            name = _tensor_digest(item.data.get_data())
        return name, item.mm_position.offset

    def _adapter(self, lora: LoRARequest) -> str:
        """Digest of an adapter's files, read when they are new or have changed; its name if it is in no folder."""
        folder = Path(lora.lora_path)
        try:
            files = [folder / _ADAPTER_CONFIG, *sorted(path for glob in _ADAPTER_WEIGHTS for path in folder.glob(glob))]
            state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
            known = self._adapters.get(lora.lora_path)
            if known is None or known[0] != state:
                known = self._adapters[lora.lora_path] = state, _files_digest(files)
        except (OSError, ValueError):
            return f"name {lora.lora_name}"
        return known[1]


def _files_digest(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        if path.name == _ADAPTER_CONFIG:
            # The same adapter may name its base model by another path on another server.
            named = json.loads(path.read_text()).items()
            config = {name: value for name, value in named if name not in _NAMES_IN_CONFIG}
            digest.update(b"config" + json.dumps(config, sort_keys=True).encode())
            continue
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE_NBYTES):
                digest.update(piece)
    return digest.hexdigest()


def _tensor_digest(value: Any) -> str:
    """Digest of tensors, and of lists and dictionaries of them."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(repr((str(value.dtype), tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(b"{")
            for name in sorted(value):
                digest.update(repr(name).encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            digest.update(f"[{len(value)}".encode())
            for each in value:
                add(each)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()
