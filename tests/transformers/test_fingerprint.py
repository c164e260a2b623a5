# SPDX-License-Identifier: Apache-2.0
"""Fingerprint of a model of transformers: of its checkpoint where it has one, of its memory where not; and vLLM's of the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvxfer.layout.fingerprints import compared, differences
from kvxfer_transformers.fingerprint import model_fingerprint
from tests.transformers.rig import tiny_model


def loaded(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def axes(one, other):
    return [name for name, _, _ in differences(one, other)]


def vllm_fingerprint(folder, override="", **options):
    """Fingerprint of a server of vLLM."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig

    from kvxfer_vllm.fingerprint import model_fingerprint as of_vllm

    load = LoadConfig(load_format=options.pop("load_format", "auto"))
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, **{"dtype": "float32", **options})
    return of_vllm(SimpleNamespace(model_config=model, load_config=load, speculative_config=None), override)


def test_models_in_memory_are_known_by_their_memory():
    """A model made twice has one fingerprint; one weight, or one setting of the rotation, makes another, and so does the dtype."""
    one, same, weight, setting = (tiny_model() for _ in range(4))
    same.config.name_or_path = "elsewhere"
    with torch.no_grad():
        weight.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    setting.config.rope_parameters = {"rope_theta": 5.0, "rope_type": "default"}
    made = model_fingerprint(one)
    assert not axes(made, model_fingerprint(same))
    assert axes(made, model_fingerprint(weight)) == ["weights"]
    assert axes(made, model_fingerprint(setting)) == ["rope theta"]
    assert "dtype" in axes(made, model_fingerprint(tiny_model().half()))


def test_a_model_that_was_changed_is_not_its_checkpoint(tmp_path):
    """A loaded model is its checkpoint, in any dtype; after a change of its weights in memory it is not."""
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    model = loaded(tmp_path)
    one = model_fingerprint(model)
    assert "weights=safetensors" in one
    assert axes(one, model_fingerprint(loaded(tmp_path, torch.bfloat16))) == ["dtype"]
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight *= 1.5
    assert "weights=memory" in model_fingerprint(model)


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_vllm_and_transformers_compute_the_same(tmp_path, kind):
    """Both engines compute one fingerprint from copies of a checkpoint, and name the axis where an option makes them differ."""
    one, copy = tmp_path / "one", tmp_path / "copy"
    for folder, size in ((one, "10GB"), (copy, "100KB")):
        tiny_model(kind).save_pretrained(folder, max_shard_size=size)
    ours = model_fingerprint(loaded(one))
    assert compared(ours) == compared(vllm_fingerprint(copy))
    assert axes(ours, vllm_fingerprint(copy, dtype="bfloat16")) == ["dtype"]
    if kind == "full":
        theirs = vllm_fingerprint(copy, hf_overrides={"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
        assert axes(ours, theirs) == ["rope theta"]
        assert axes(ours, vllm_fingerprint(copy, hf_overrides={"rms_norm_eps": 1e-3})) == ["settings"]
        assert set(axes(ours, vllm_fingerprint(copy, load_format="dummy"))) == {"K", "weights"}


def test_engines_that_are_told_the_same_are_equal(tmp_path):
    """vLLM and transformers compute the same of one ``model_fingerprint`` and dtype."""
    tiny_model().save_pretrained(tmp_path)
    model, theirs = tiny_model(), vllm_fingerprint(tmp_path, "my model, 3")
    assert model_fingerprint(model, "my model, 3") == theirs
    assert axes(model_fingerprint(model, "my model, 4"), theirs) == ["model"]
    assert axes(model_fingerprint(model.half(), "my model, 3"), theirs) == ["dtype"]
