# SPDX-License-Identifier: Apache-2.0
"""Identity of a prompt: a digest of all that the KV of its first tokens depends on, which ties a lease to its prompt.

The two servers may know adapters and images by different names, so their content counts, where vLLM has it.
"""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvxfer_vllm.transfer_params import RefusalReason

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
_MEDIA, _WEIGHTS = ".", "@"


class TokenIdError(ValueError):
    """A token id of a prompt is not a whole number of 32 bits."""


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
        """Digest of a request's first ``num_tokens`` tokens, see `judge`.

        With media their number follows, and the digest without them; last comes that of the version of the weights.

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
        if media:
            digest = _MEDIA.join((prompt_digest(tokens, media=media, **context), str(len(media)), digest))
        weights = hashlib.blake2b(self.weights.encode(), digest_size=16).hexdigest() if self.weights else ""
        return f"{digest}{_WEIGHTS}{weights}" if weights else digest

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


def prompt_digest(
    token_ids: Sequence[int],
    *,
    media: Sequence[tuple[str, int]] = (),
    adapter: str | None = None,
    cache_salt: str | None = None,
    embeds: str | None = None,
) -> str:
    """Digest in 32 hex digits, equal on both servers exactly if the KV of the two prompts means the same.

    Args:
        token_ids: each within 32 bits.
        media: content and position in the prompt of each image, sound, ...; their tokens are placeholders.
        adapter: identity of the LoRA adapter.
        cache_salt: keeps the prefix caches of tenants apart.
        embeds: digest of the embeddings that stand in the place of tokens.

    Raises:
        TokenIdError: a token id is not a whole number of 32 bits.
    """
    # What is not tokens goes into one list, in a form in which different values look different.
    context = repr((len(token_ids), list(media), adapter, cache_salt, embeds)).encode()
    digest = hashlib.blake2b(context, digest_size=16)
    try:
        digest.update(array.array("i", token_ids).tobytes())
    except (OverflowError, TypeError) as error:
        raise TokenIdError(f"a token id of the prompt is no whole number of 32 bits: {error}") from error
    return digest.hexdigest()


def judge(lease_digest: str, digest: str) -> RefusalReason | None:
    """Judge whether a lease has the KV of the prompt with this digest; None if it has.

    A client may have changed the lease's digest, so it may have any form.
    """
    if lease_digest == digest:
        return None
    (theirs, _, their_weights), (ours, _, our_weights) = (each.partition(_WEIGHTS) for each in (lease_digest, digest))
    (their_media, their_rest), (our_media, our_rest) = map(_media_of, (theirs, ours))
    if their_rest == our_rest and their_media > our_media:
        return RefusalReason.NO_MEDIA
    return RefusalReason.OTHER_PROMPT if their_weights == our_weights else RefusalReason.OTHER_WEIGHTS


def _media_of(digest: str) -> tuple[int, str]:
    """Number of media that a digest is of, and the digest without them."""
    _, has_media, rest = digest.partition(_MEDIA)
    number, _, without = rest.partition(_MEDIA)
    return (int(number), without) if has_media and number.isdecimal() else (0, digest)


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
