# SPDX-License-Identifier: Apache-2.0
"""Fingerprint of a model that servers of any engine compute alone: equal exactly if KV of one means the same to the other.

Names, paths and revisions are hints for people. Where an engine may keep K in its own way, its name is a fact.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvxfer.layout import fingerprints
from kvxfer_serving.checkpoint import Checkpoint, stored_config
from kvxfer_serving.model_facts import SAME_K_IN_ANY_ENGINE, rotation_facts, settings_digest, window_facts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as an engine has it.

    Attributes:
        engine: name of the kind of engine.
        name: name or path that it was loaded from.
        place: folder or file that it was loaded from; None if it is on no disk.
        unread: what stands for the weights where they are no files that can be read.
        is_stored: the weights are those in ``place``, if there are any.
        config: the configuration that the engine uses.
        text_config: of its language model; the same for most models.
        changed: entries of the configuration that options have set.
        dtype: of the computation.
        quantization: of the weights; empty if there is none.
        facts: others that only some engines have.
    """

    engine: str
    name: str
    place: Path | None
    unread: str
    is_stored: bool = True
    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    changed: frozenset[str] = frozenset()
    dtype: str
    quantization: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def fingerprint_of(model: ServedModel, override: str = "") -> str:
    """Fingerprint of a model; reads samples of its checkpoint.

    Args:
        model: as the engine has it.
        override: replaces all but the dtype and ``model.facts``.

    Raises:
        ConfigError: the checkpoint cannot be read.
    """
    dtype = {"dtype": model.dtype.removeprefix("torch.")}
    if override:
        return fingerprints.of_facts({"model": override, **dtype, **model.facts})
    checkpoint = Checkpoint.of(model.place) if model.place is not None and model.is_stored else None
    stored = stored_config(model.place) if model.place is not None else {}
    if checkpoint is not None:
        weights = checkpoint.digest()
    else:
        weights = model.unread
        logger.warning(
            "The weights of %s are no files that can be compared: to other servers they are %r. Set model_fingerprint where"
            " other servers have the same weights by another name, or other weights by the same name.",
            model.name,
            weights,
        )
    facts = {
        "weights": weights,
        "settings": settings_digest(model.config, stored, model.changed),
        **dtype,
        **rotation_facts(model.text_config),
        **window_facts(model.text_config),
        "head size": str(model.text_config.get("head_dim") or ""),
        "K": _kept_keys(model, checkpoint),
        **({"quantization": model.quantization} if model.quantization else {}),
        **model.facts,
    }
    made = fingerprints.of_facts(facts, hint=model.name.rstrip("/").rpartition("/")[2])
    logger.info("kvxfer: to other servers the model %s is %s", model.name, made)
    return made


def _kept_keys(model: ServedModel, checkpoint: Checkpoint | None) -> str:
    """Words for what is in the cache as K: the same for two engines only where they surely keep the same."""
    known = str(model.text_config.get("model_type", "")) in SAME_K_IN_ANY_ENGINE
    if not known or model.quantization or checkpoint is None or not checkpoint.tensors:
        return f"as {model.engine} has it"
    normed = any(".k_norm." in tensor.name for tensor in checkpoint.tensors)
    return "after norm and rotation" if normed else "after rotation"


def digest_of(*facts: object) -> str:
    """Digest of facts that stand for the weights, in 16 hex digits."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
