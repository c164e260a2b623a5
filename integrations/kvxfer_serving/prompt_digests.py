# SPDX-License-Identifier: Apache-2.0
"""Identity of a prompt: a digest of all that the KV of its first tokens depends on, which ties a lease to its prompt."""

from __future__ import annotations

import array
import hashlib
from typing import TYPE_CHECKING, Final

from kvxfer_serving.refusals import RefusalReason, RefusedParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.protocol.lease_ref import LeaseRef

_MEDIA, _WEIGHTS = ".", "@"
_WHY: Final = {
    RefusalReason.OTHER_PROMPT: "the lease is for another prompt",
    RefusalReason.OTHER_WEIGHTS: "the lease is for KV of other weights",
    RefusalReason.NO_MEDIA: "the request lacks the images or other media of the prompt",
}


class TokenIdError(ValueError):
    """A token id of a prompt is not a whole number of 32 bits."""


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


def joined_digest(digest: str, *, with_media: str = "", num_media: int = 0, weights: str = "") -> str:
    """Digest of a prompt that tells, where it differs from another one, whether media or weights are the reason.

    Args:
        digest: of the prompt, without media.
        with_media: of the prompt with its media; empty if it has none.
        num_media: number of them.
        weights: version of the weights; empty for those of the checkpoint.
    """
    if num_media:
        digest = _MEDIA.join((with_media, str(num_media), digest))
    return f"{digest}{_WEIGHTS}{hashlib.blake2b(weights.encode(), digest_size=16).hexdigest()}" if weights else digest


def refused(reason: RefusalReason) -> RefusedParams:
    """Refusal for one of the reasons of `judge`."""
    return RefusedParams(reason, _WHY[reason])


def judge_lease(lease: LeaseRef, most_tokens: int, digest_of: Callable[[int], str]) -> RefusalReason | None:
    """Judge whether a lease has the KV of a prompt, or of its first tokens; None if it has.

    Args:
        lease: from a client.
        most_tokens: of the prompt that a lease may be of.
        digest_of: digest of the first tokens of the prompt, by their number.
    """
    if not 0 < lease.num_tokens <= most_tokens:
        return RefusalReason.OTHER_PROMPT
    return judge(lease.digest, digest_of(lease.num_tokens))


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
