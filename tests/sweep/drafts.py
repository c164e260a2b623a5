# SPDX-License-Identifier: Apache-2.0
"""An EAGLE head whose guesses are often right, made from the model that it drafts for."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["make_eagle"]


def make_eagle(model: Path, folder: Path) -> tuple[Path, Path]:
    """Make a Llama that can be drafted for, and its head; returns their folders.

    The head has the layers of the Llama and looks at the tokens only, so it computes nearly what the Llama does. The head has no
    first norm, so the embeddings of this Llama have the length that a norm would give them.
    """
    from safetensors.torch import load_file, save_file
    from torch import cat, eye, zeros

    target, head = folder / f"{model.name}-target", folder / f"{model.name}-eagle"
    for each in (target, head):
        shutil.copytree(model, each, dirs_exist_ok=True)
    weights = load_file(str(model / "model.safetensors"))
    embeddings = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = embeddings / embeddings.pow(2).mean(-1, keepdim=True).sqrt()
    save_file(weights, str(target / "model.safetensors"), {"format": "pt"})
    layers = {name.removeprefix("model."): value for name, value in weights.items() if ".layers." in name}
    layers.pop("layers.0.input_layernorm.weight")
    hidden = embeddings.shape[1]
    layers["fc.weight"] = cat([eye(hidden), zeros(hidden, hidden)], 1).to(embeddings.dtype)
    save_file(layers, str(head / "model.safetensors"), {"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (head / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}), encoding="utf-8")
    return target, head
