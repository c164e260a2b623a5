# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of models: what each fact is, and which of them differ."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.layout.fingerprints import compared, differences
from kvxfer_serving.model_facts import rotation_facts, settings_digest, window_facts
from kvxfer_serving.model_identity import ServedModel, fingerprint_of
from tests.serving.test_checkpoint import TENSORS, write_file

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "transformers_version": "5.0",
    "dtype": "float32",
}
AXES = {
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}},
    "rope factor": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "factor": 8.0}},
    "rope share": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "rope scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "low_freq_factor": 2}},
    "window": {"sliding_window": 512},
    "head size": {"head_dim": 64},
    "settings": {"rms_norm_eps": 1e-5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a checkpoint."""
    made = tmp_path_factory.mktemp("some-model")
    write_file(made / "model.safetensors", TENSORS)
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def served(folder, config=None, **more):
    config = CONFIG if config is None else config
    fields = {"engine": "vLLM", "name": str(folder), "place": folder, "unread": "nothing", "config": config}
    return fingerprint_of(ServedModel(**{**fields, "text_config": config, "dtype": "torch.float32", **more}))


def axes(one, other):
    return [name for name, _, _ in differences(one, other)]


def test_engines_with_the_same_checkpoint_are_equal(folder, tmp_path):
    """Two kinds of engines are equal with the same checkpoint in another folder, whatever defaults their configurations add."""
    other = tmp_path / "copy"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = {**CONFIG, "added_by_another_version": 3, "transformers_version": "6.0", "_private": 1}
    one, two = served(folder), served(other, config, engine="transformers")
    assert one != two and compared(one) == compared(two)
    assert not axes(one, two)


@pytest.mark.parametrize("axis", AXES)
def test_one_difference_is_told_by_its_name(folder, axis):
    """A difference in one property of the configuration is one difference, and has its name and both values."""
    one, two = served(folder), served(folder, {**CONFIG, **AXES[axis]})
    assert axes(one, two) == [axis]


def test_values_are_told(folder):
    """The sentence has the values of both sides as they are."""
    ((axis, here, there),) = differences(served(folder), served(folder, {**CONFIG, **AXES["rope theta"]}))
    assert (axis, here.split(" ")[0], there.split(" ")[0]) == ("rope theta", "10000", "500000")


@given(st.dictionaries(st.sampled_from(sorted(AXES)), st.booleans()))
def test_all_differences_are_told(folder, chosen):
    """Any set of differences is told, each by its name; those of the rotation change one entry, of which the last one counts."""
    changes = [axis for axis, is_changed in chosen.items() if is_changed]
    rotation = [axis for axis in changes if axis.startswith("rope")][-1:]
    changes = [axis for axis in changes if not axis.startswith("rope")] + rotation
    config = dict(CONFIG)
    for axis in changes:
        config |= AXES[axis]
    assert axes(served(folder), served(folder, config)) == sorted(changes)


def test_weights_dtype_quantization_and_facts_of_an_engine(folder, tmp_path):
    """Other weights, another dtype, quantisation and drafts are each told by name."""
    base = served(folder)
    write_file(tmp_path / "model.safetensors", {**TENSORS, "model.norm.weight": ("BF16", (8,), b"0123456789abcdeg")})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert axes(base, served(tmp_path)) == ["weights"]
    assert axes(base, served(folder, dtype="bfloat16")) == ["dtype"]
    assert axes(base, served(folder, quantization="fp8")) == ["K", "quantization"]
    assert axes(base, served(folder, facts={"drafts": "eagle"})) == ["drafts"]


def test_where_engines_may_keep_k_in_other_ways_they_are_not_equal(folder, tmp_path):
    """Model types that are not known to be kept alike, and quantised ones, are equal for two engines of one kind only."""
    unknown, quantized = {**CONFIG, "model_type": "deepseek_v3"}, {"quantization": "awq"}
    for config, more in ((unknown, {}), (CONFIG, quantized)):
        vllm = served(folder, config, **more)
        assert not axes(vllm, served(folder, config, **more))
        assert axes(vllm, served(folder, config, engine="transformers", **more)) == ["K"]
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert axes(served(tmp_path), served(tmp_path, engine="transformers")) == ["K"]


def test_weights_that_are_no_files_are_told_in_the_log(tmp_path, caplog):
    """Without files the weights are what the engine says, a warning says so, and they never equal those of files."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with caplog.at_level(logging.WARNING, "kvxfer_serving"):
        one = served(tmp_path, unread="dummy 1")
    assert "no files that can be compared" in caplog.text and "model_fingerprint" in caplog.text
    assert axes(one, served(tmp_path, unread="dummy 2")) == ["weights"]
    assert not axes(one, served(None, unread="dummy 1"))


def test_an_override_replaces_all_but_the_dtype(folder):
    """Servers that are told the same name are equal, whatever they have; dtype and drafts are compared nevertheless."""
    fields = {"name": "", "place": folder, "unread": "", "config": {}, "text_config": {}, "dtype": "float32"}
    one, other = (fingerprint_of(ServedModel(engine=each, **fields), "my model, 3") for each in ("vLLM", "other"))
    assert one == other
    assert axes(one, fingerprint_of(ServedModel(engine="vLLM", **fields), "my model, 4")) == ["model"]
    assert axes(one, fingerprint_of(ServedModel(engine="vLLM", **{**fields, "dtype": "float16"}), "my model, 3")) == [
        "dtype"
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 4}},
        ),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}},
        ),
        (
            {"rotary_pct": 0.25, "rope_theta": 1e4},
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        ),
    ],
)
def test_old_and_new_names_of_the_rotation_are_equal(old, new):
    """Configurations of transformers 4 and 5 say the same of the rotation in different words."""
    assert rotation_facts(old) == rotation_facts(new)


def test_facts_of_rotation_and_windows_by_kind_of_layers():
    """What differs between the kinds of layers has their name; models without rotation and without windows say so."""
    parameters = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6, "factor": 8}}
    assert rotation_facts({"rope_parameters": parameters}) == {
        "rope": "default",
        "sliding rope theta": "10000",
        "full rope theta": "1000000",
        "full rope factor": "8",
    }
    assert rotation_facts({}) == {"rope": "none"}
    assert window_facts({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}) == {
        "window": "128 sf"
    }
    for config in (
        {},
        {"sliding_window": 9, "layer_types": ["full_attention"]},
        {"sliding_window": 9, "use_sliding_window": False},
    ):
        assert window_facts(config) == {"window": "none"}


def test_settings_that_options_have_added_count():
    """An entry that the checkpoint's configuration lacks counts if an option has set it, also inside of a part."""
    stored = {"text_config": {"hidden_act": "silu"}}
    config = {"text_config": {"hidden_act": "silu", "softcap": 5}, "default": 1}
    base = settings_digest(stored, stored)
    assert settings_digest(config, stored) == base
    assert settings_digest(config, stored, ["text_config"]) != base
    assert settings_digest(config, stored, ["default"]) != base
