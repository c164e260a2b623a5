# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights, made without a download, whose tokens change with one wrong KV block.

A recipe (architecture, sizes, seed) becomes a checkpoint with random weights, and a byte-level BPE tokenizer with a chat
template, so that completions and chat both work. The weights have a wide spread (``initializer_range`` 0.3): greedy output then
depends strongly on every cached key and value, whereas vLLM's dummy weights, or the usual 0.02, give the same tokens with any KV
cache.

The folder of a checkpoint is named after the recipe's content. It is written beside its place and then renamed, so that two
processes at once both get a complete model, and a killed process leaves no incomplete one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.serve.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["HYBRID", "KV_HEAVY", "SMALL", "STATES", "ModelRecipe", "default_model_folder", "make_model"]

# Bumped whenever the code below would make different files from the same recipe.
_RECIPE_VERSION = 1

_BOS, _EOS, _USER, _ASSISTANT, _END = "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"
_SPECIAL_TOKENS = (_BOS, _EOS, _USER, _ASSISTANT, _END)

_CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{{ message['content'] }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Any text would do; with this one the tokenizer is the same everywhere.
_TRAINING_TEXT = (
    "A prefill engine reads the whole prompt and leaves keys and values behind, block by block.",
    "A decode engine continues where the prefill engine stopped, one token after another.",
    "Between the two the cache of the request moves: every layer, every head, every token.",
    "The owner of the blocks lends them for a while; the borrower renews the lease and settles it.",
    "If the lease has ended, the bytes that were read are thrown away and never served.",
    "What is the capital of a country, how far is the moon, and who wrote the first program?",
    "Please write a short story about a river, a bridge, and the people who cross it each morning.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 100 1000 2026",
)


@dataclass(frozen=True)
class ModelRecipe:
    """Recipe of a model; equal recipes give equal files.

    ``max_positions`` is the longest context in tokens. ``dtype`` is the dtype of weights and KV cache; with float32
    rounding is so small that greedy tokens do not depend on how a server batches its requests.
    ``architecture`` is one of :data:`~tools.serve.architectures.ARCHITECTURES`, ``settings`` go over what its configuration has.
    ``window_tokens`` is the sliding window of an architecture that has one.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    initializer_range: float = 0.3
    vocabulary: int = 512
    max_positions: int = 8192
    seed: int = 20260
    window_tokens: int = 0
    architecture: str = "llama"
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def kv_nbytes_per_token(self) -> int:
        """Bytes of KV cache one token takes (keys and values, all layers)."""
        itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    @property
    def folder_name(self) -> str:
        """Name of the model's folder: name of the recipe and a digest of its content."""
        content = json.dumps([_RECIPE_VERSION, dataclasses.asdict(self), _TRAINING_TEXT, _CHAT_TEMPLATE])
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


#: The model of ``make serve`` and the end-to-end tests; starts fast.
SMALL = ModelRecipe(
    name="kvxfer-small",
    hidden=256,
    intermediate=512,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    dtype="float32",
)

#: A model with layers of two kinds, and so with several cache groups in vLLM.
HYBRID = dataclasses.replace(SMALL, name="kvxfer-hybrid", architecture="gemma3", layers=6, window_tokens=128)

#: A model with states, which vLLM serves on CPUs in bfloat16 only.
STATES = dataclasses.replace(SMALL, name="kvxfer-states", architecture="qwen3-next", dtype="bfloat16")

#: For transfer benchmarks through real servers: 128 KiB of KV per token behind very little compute.
KV_HEAVY = ModelRecipe(
    name="kvxfer-kv-heavy",
    hidden=128,
    intermediate=128,
    layers=32,
    heads=8,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
)


def default_model_folder() -> Path:
    """Default folder of models: ``KVXFER_MODEL_FOLDER``, else the user's cache folder."""
    explicit = os.environ.get("KVXFER_MODEL_FOLDER")
    if explicit:
        return Path(explicit)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvxfer" / "models"


def make_model(recipe: ModelRecipe = SMALL, folder: Path | None = None) -> Path:
    """Make the model unless it exists; returns its folder, for ``--model``.

    ``folder`` holds models side by side (default: :func:`default_model_folder`). Blocking: a few seconds the first
    time. Safe to call from several processes at once.

    Raises:
        ImportError: torch, transformers or tokenizers is not installed.
        OSError: the folder cannot be written.
    """
    parent = default_model_folder() if folder is None else folder
    target = parent / recipe.folder_name
    if target.is_dir():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{recipe.folder_name}.", dir=parent))
    try:
        _write_tokenizer(recipe, work)
        _write_weights(recipe, work)
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            # Another process finished the same model first; its files equal ours.
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write_tokenizer(recipe: ModelRecipe, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - heavy, and only here

    architecture = ARCHITECTURES[recipe.architecture]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[*_SPECIAL_TOKENS, *architecture.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer=trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _BOS,
            "eos_token": _EOS,
            "pad_token": _EOS,
            "model_max_length": recipe.max_positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    for name, content in architecture.files.items():
        _write_json(folder / name, dict(content))


def _write_weights(recipe: ModelRecipe, folder: Path) -> None:
    import torch  # noqa: PLC0415 - heavy, and only here
    from transformers.utils import logging  # noqa: PLC0415 - as torch

    dtype: Any = getattr(torch, recipe.dtype)
    # fork_rng: keep the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = ARCHITECTURES[recipe.architecture].make(
            recipe, bos_token_id=_SPECIAL_TOKENS.index(_BOS), eos_token_id=_SPECIAL_TOKENS.index(_EOS)
        )
        model = model.to(dtype)
    chatter: Any = logging  # untyped upstream
    chatter.disable_progress_bar()
    model.save_pretrained(str(folder))
    chatter.enable_progress_bar()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
