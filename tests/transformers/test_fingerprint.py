# SPDX-License-Identifier: Apache-2.0
"""Identity of a model: what makes two engines equal, and what keeps them apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvxfer_transformers.fingerprint import model_fingerprint
from tests.transformers.rig import tiny_model


def test_equal_weights_and_configurations_are_equal():
    """A model loaded twice has one fingerprint; one weight, or one setting of the rotation, makes another, and so does the dtype."""
    one, same, weight, setting = (tiny_model() for _ in range(4))
    same.config.name_or_path = "elsewhere"
    with torch.no_grad():
        weight.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    setting.config.rope_parameters = {"rope_theta": 5.0, "rope_type": "default"}
    prints = [model_fingerprint(each) for each in (one, weight, setting, tiny_model().half())]
    assert model_fingerprint(same) == prints[0]
    assert len(set(prints)) == 4


def test_two_kinds_of_engines_that_are_told_the_same_are_equal():
    """vLLM and transformers compute the same of one ``model_fingerprint`` and dtype; not where layers have windows."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from kvxfer_vllm import rank_cache

    model = tiny_model()
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32), speculative_config=None)
    theirs = rank_cache.model_fingerprint(config, "my model, 3")
    assert model_fingerprint(model, "my model, 3") == theirs
    assert model_fingerprint(model, "my model, 4") != theirs
    assert model_fingerprint(model.half(), "my model, 3") != theirs
    assert model_fingerprint(tiny_model(), "my model, 3", windows=True) != theirs
