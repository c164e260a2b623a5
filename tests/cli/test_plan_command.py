# SPDX-License-Identifier: Apache-2.0
"""`kvxfer plan`: what it answers, what it refuses, and that no question makes it stumble."""

from __future__ import annotations

import io
import json
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.cli import main
from kvxfer.cli.pictures import picture
from kvxfer.cli.pictures.window import MOST_CELLS, window
from kvxfer.cli.planning.forecast import MAX_TOKENS, PlannedRequest, matched, ranges
from kvxfer.cli.planning.hf_config import from_config
from kvxfer.cli.planning.models import MODELS
from kvxfer.cli.planning.specs import read_side, same_model, stages
from kvxfer.cli.planning.words import OPTIONS, Words, written
from kvxfer.errors import ConfigError
from kvxfer.layout.axes import KVLayout

if TYPE_CHECKING:
    from kvxfer.layout.spec import CacheSpec


def ask(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``kvxfer plan`` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["plan", *arguments])
    return code, out.getvalue(), err.getvalue()


def answer(*arguments: str) -> dict:
    code, out, err = ask(*arguments, "--format", "json")
    assert code in (0, 1), err
    return json.loads(out)


def only_target(*arguments: str) -> dict:
    (target,) = answer(*arguments)["targets"]
    return target


def specs_of(text: str, tokens: int = 4096) -> tuple[CacheSpec, ...]:
    return read_side(written(text), tokens).specs


# -- what it says -------------------------------------------------------------------------------------------------------


def test_the_example_of_the_help_says_everything():
    """Text names the model, both sides, bytes, ranks, descriptors, route, reason, staging and the time of each route."""
    code, out, err = ask(
        "--source", "llama-3-8b tp=4 order=HND block=16", "--target", "llama-3-8b tp=1 order=NHD block=32"
    )
    assert (code, err) == (0, "")
    for words in (
        "llama-3-8b: 32 layers, 8 KV heads, bfloat16; 128.0 KiB per token",
        "4 ranks (tp=4), LBHNC (HND), 324 blocks of 16 tokens, 2 of 8 heads each, K and V together",
        "1 rank, LBNHC (NHD), 164 blocks of 32 tokens",
        "0-3  512.0 MiB  1,048,576  1,048,576     512 B",
        "Target rank 0 in detail:",
        "<- chosen",
        "source_packed",
        "why       ",
    ):
        assert words in out, words


def test_equal_caches_need_one_descriptor_for_each_layer():
    """Blocks in a row of two caches of one layout merge until a layer is one descriptor, moved in place."""
    target = only_target("--model", "llama-3-8b")
    assert (target["nbytes"], target["runs"], target["descriptors"]) == (4096 * 131072, 32 * 256, 32)
    assert target["sources"][0]["route"] == "direct" and target["staging_nbytes"] == 0


def test_scattered_blocks_need_one_descriptor_for_each_block_of_each_layer():
    """--fragmented puts blocks anywhere, and the same seed puts them at the same places again."""
    question = ("--model", "llama-3-8b", "--fragmented", "--blocks", "300", "--seed", "3")
    target = only_target(*question)
    assert 32 * 200 < target["descriptors"] <= target["runs"] == 32 * 256
    assert only_target(*question) == target != only_target(*question[:-1], "4")


def test_the_forms_of_a_question_mean_the_same():
    """Two sides, a model for both with --to-..., and a target without a model are one question."""
    one = answer("--source", "llama-3-8b tp=4 block=32", "--target", "llama-3-8b tp=2 block=32 order=NHD apart")
    two = answer(
        "--model", "llama-3-8b", "--tp", "4", "--block", "32", "--to-tp", "2", "--to-order", "nhd", "--to-apart"
    )
    three = answer("--source", "llama-3-8b tp=4 block=32", "--target", "tp=2 block=32 order=LBNHC apart=yes")
    assert one == two == three
    assert len(one["targets"]) == 2 and one["source"]["ranks"] == 4


@pytest.mark.parametrize(("source", "target"), [(1, 4), (4, 1), (2, 8), (8, 2), (4, 16), (16, 4), (16, 1)])
def test_each_head_reaches_each_rank_that_holds_it(source: int, target: int):
    """Whatever the ranks of either side, all target ranks together get each head once for each rank that holds it."""
    found = answer("--model", "llama-3-8b", "--tp", str(source), "--to-tp", str(target), "--tokens", "100")
    copies = max(1, target // 8)
    assert sum(each["nbytes"] for each in found["targets"]) == copies * 100 * 131072
    for each in found["targets"]:
        assert sum(part["nbytes"] for part in each["sources"]) == each["nbytes"]


@pytest.mark.parametrize(
    ("model", "nbytes"),
    [
        ("llama-3-8b", 131_072),
        ("llama-3-70b", 327_680),
        ("llama-3-405b", 516_096),
        ("mistral-7b", 131_072),
        ("mixtral-8x7b", 131_072),
        ("qwen2.5-7b", 57_344),
        ("qwen3-32b", 262_144),
        ("deepseek-v3", 70_272),
        ("gpt-oss-20b", 49_152),
        ("gemma-2-9b", 344_064),
    ],
)
def test_known_models_have_the_bytes_per_token_that_are_published(model: str, nbytes: int):
    """2 x layers x KV heads x head_dim x 2 bytes, or layers x 576 x 2 for a latent."""
    assert answer("--model", model, "--tokens", "100")["source"]["token_nbytes"] == nbytes


@pytest.mark.parametrize("model", sorted(MODELS))
def test_each_known_model_can_be_asked_about(model: str):
    """Each model of the table is served by itself, on other ranks and in another order."""
    found = answer("--model", model, "--tp", "2", "--to-tp", "1", "--to-order", "BLNHC", "--to-block", "48")
    assert found["good"] and found["targets"][0]["nbytes"] > 0


def test_layers_with_a_window_move_its_tokens_only():
    """A sliding layer's tokens before its window stay, rounded down to a block of the target."""
    tokens, window_, block = 10_000, 4096, 48
    target = only_target("--model", "gemma-2-9b", "--to-block", str(block), "--tokens", str(tokens))
    layer = 8 * 2 * 256 * 2
    kept = tokens - (tokens - window_) // block * block
    assert target["nbytes"] == 21 * layer * tokens + 21 * layer * kept


def test_tokens_that_the_target_has_stay():
    """--from-token leaves out the beginning, in the middle of a block too."""
    target = only_target("--model", "llama-3-8b", "--tokens", "1000", "--from-token", "333")
    assert target["nbytes"] == 667 * 131072


def test_pipeline_stages_give_their_layers():
    """Layers come from the stage that has them, shared as vLLM shares them; each source rank is named."""
    found = answer("--model", "deepseek-v3", "--pp", "4", "--to-pp", "1", "--tokens", "64")
    assert [part["layers"] for part in found["targets"][0]["sources"]] == ["0-14", "15-29", "30-45", "46-60"]
    assert [len(stage) for stage in stages(61, 4)] == [15, 15, 16, 15]
    assert [len(stage) for stage in stages(10, 4)] == [2, 3, 3, 2]


def test_one_rank_can_be_asked_about():
    """--rank narrows the answer to one target rank and keeps all source ranks."""
    found = answer("--model", "llama-3-8b", "--tp", "8", "--to-tp", "4", "--rank", "2")
    assert [each["rank"] for each in found["targets"]] == [2]
    assert [part["source_rank"] for part in found["targets"][0]["sources"]] == [4, 5]


def test_keys_of_the_json_stay():
    """Programs rely on these keys."""
    found = answer("--model", "llama-3-8b", "--to-order", "NHD")
    assert set(found) == {"good", "source", "target", "request", "convert", "slot_nbytes", "targets"}
    assert set(found["targets"][0]) == {
        "rank", "refused", "nbytes", "runs", "descriptors", "descriptors_exact", "mean_run_nbytes", "staging_nbytes",
        "seconds", "sources",
    }  # fmt: skip
    part = found["targets"][0]["sources"][0]
    assert set(part) == {
        "source_rank", "layers", "heads", "nbytes", "runs", "descriptors", "descriptors_exact", "mean_run_nbytes",
        "route", "why", "seconds", "barred", "staging_nbytes",
    }  # fmt: skip
    assert set(part["seconds"]) == {"direct", "source_packed", "target_unpacked", "both"}
    assert all(part["seconds"].values())


def test_memory_without_an_address_is_packed():
    """A side that no transfer engine can reach has no direct route, and the reason is given."""
    part = only_target("--source", "llama-3-8b addressable=no", "--target", "tp=1")["sources"][0]
    assert part["seconds"]["direct"] is None and "address" in part["barred"]["direct"]
    assert part["route"] in ("source_packed", "both")


def test_a_route_can_be_asked_for():
    """--route takes one, fast or not, and still says what the others would take."""
    part = only_target("--model", "llama-3-8b", "--to-order", "NHD", "--route", "direct")["sources"][0]
    assert part["route"] == "direct" and part["seconds"]["both"] < part["seconds"]["direct"]


def test_measured_costs_change_the_prediction(tmp_path):
    """--costs takes a file of constants; a wire ten times as fast takes a tenth of the time."""
    slow, fast = tmp_path / "slow.json", tmp_path / "fast.json"
    slow.write_text('{"wire_nbytes_per_s": 1e9, "descriptor_s": 1e-12}')
    fast.write_text('{"wire_nbytes_per_s": 1e10, "descriptor_s": 1e-12}')
    times = [only_target("--model", "llama-3-8b", "--costs", str(path))["seconds"] for path in (slow, fast)]
    assert times[0] == pytest.approx(10 * times[1])


# -- refusals: exit code 1 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "axis"),
    [
        ("llama-3-8b", "mistral-7b", "fingerprint"),
        ("llama-3-8b", "llama-3-8b dtype=fp8", "dtype"),
        ("llama-3-8b fingerprint=x", "llama-3-70b fingerprint=x", "layers"),
        ("llama-3-8b fingerprint=x", "llama-3-8b heads=4 fingerprint=x", "heads"),
        ("llama-3-8b fingerprint=x", "llama-3-8b head_dim=64 fingerprint=x", "content"),
        ("gemma-2-9b fingerprint=x", "llama-3-8b layers=42 fingerprint=x", "groups"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_axis(source: str, target: str, axis: str):
    """Exit code 1, one sentence in text, the axis in JSON."""
    found = answer("--source", source, "--target", target)
    assert not found["good"] and found["targets"][0]["refused"]["axis"] == axis
    code, out, err = ask("--source", source, "--target", target)
    assert (code, err) == (1, "") and f"refused   this pair, for its {axis}: " in out


def test_dtypes_can_be_converted_on_request():
    """A pair that is refused for its dtypes is told how it would work, and works so, with the bytes of the source."""
    question = ("--model", "llama-3-8b", "--to-dtype", "fp8")
    assert "--convert" in ask(*question)[1]
    target = only_target(*question, "--convert")
    assert target["nbytes"] == 4096 * 131072 and target["sources"][0]["route"] != "direct"


def test_a_forced_route_that_cannot_be_taken_is_refused():
    """--route of a barred route says why it is barred."""
    target = only_target("--model", "tiny", "--to-dtype", "fp8", "--convert", "--route", "direct")
    assert target["refused"]["axis"] == "route" and "type" in target["refused"]["why"]


# -- files --------------------------------------------------------------------------------------------------------------


def test_files_of_specs_are_read(tmp_path):
    """One CacheSpec or a list of them, as engines write them, means the same as the shorthand that makes them."""
    one, all_ = tmp_path / "one.json", tmp_path / "all.json"
    one.write_bytes(msgspec.json.encode(specs_of("llama-3-8b order=NHD")[0]))
    all_.write_bytes(msgspec.json.encode(specs_of("llama-3-8b tp=4")))
    found = answer("--source", str(all_), "--target", str(one))
    assert found["targets"] == answer("--source", "llama-3-8b tp=4", "--target", "order=NHD")["targets"]
    assert found["target"]["what"] == str(one)


def test_a_file_and_a_shorthand_are_one_model(tmp_path):
    """A side that says nothing of its model has the other's fingerprint; a side that does is compared."""
    path = tmp_path / "a.json"
    path.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(specs_of("llama-3-8b fingerprint=x")[0], fingerprint="hash"))
    )
    mine = "layers=32 heads=8 head_dim=128"
    assert answer("--source", str(path), "--target", mine)["good"]
    assert not answer("--source", str(path), "--target", "llama-3-8b")["good"]
    assert answer("--source", str(path), "--target", "llama-3-8b fingerprint=hash")["good"]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("meta-llama/Llama-3.1-405B", "llama-3-405b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
    ],
)
def test_the_name_of_a_checkpoint_names_its_model(name: str, model: str):
    """Organisations and endings like -Instruct say nothing of the cache; both names mean one model."""
    assert answer("--source", name, "--target", model)["source"]["what"] == model


@pytest.mark.parametrize("where", ["-", "/dev/stdin"])
def test_standard_input_is_a_file(where: str, monkeypatch):
    """Specs and configurations may come through a pipe, for both sides."""
    for prefix, content in (
        ("", msgspec.json.encode(specs_of("llama-3-8b"))),
        ("vllm:", json.dumps({"model_type": "llama", "num_key_value_heads": 8}).encode()),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        target = only_target("--source", prefix + where, "--target", prefix + where)
        assert target["nbytes"] == 4096 * 131072
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
        assert "standard input" in ask("--model", prefix + where)[2]


CONFIGS = {
    "llama": (
        {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096},
        "llama-3-8b",
    ),
    "head_dim": (
        {"num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
         "hidden_size": 5120, "torch_dtype": "bfloat16", "sliding_window": None, "use_sliding_window": False},
        "qwen3-32b",
    ),
    "latent": (
        {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
         "qk_rope_head_dim": 64, "model_type": "deepseek_v3"},
        "deepseek-v3",
    ),
    "layer_types": (
        {"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
         "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12, "dtype": "bfloat16"},
        "gpt-oss-20b",
    ),
    "gemma2": (
        {"num_hidden_layers": 42, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096,
         "model_type": "gemma2"},
        "gemma-2-9b",
    ),
    "inside": (
        {"dtype": "bfloat16", "vision_config": {"num_hidden_layers": 27}, "model_type": "gemma3",
         "text_config": {"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
                         "sliding_window_pattern": 6}},
        "gemma-3-27b",
    ),
    "unused": (
        {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584,
         "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28, "model_type": "qwen2"},
        "qwen2.5-7b",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_json_is_the_model_of_the_table(name: str, tmp_path):
    """The configuration that a model is published with agrees with the table, and `vllm:` takes the file or its folder."""
    config, model = CONFIGS[name]
    read, known = from_config(config, name), MODELS[model]
    for field in fields(known):
        if field.name not in ("name", "head_dim" if known.latent else "name"):
            assert getattr(read, field.name) == getattr(known, field.name), field.name
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    wanted = answer("--model", model, "--tp", "2", "--to-tp", "1")
    for where in (path, tmp_path):
        found = answer("--source", f"vllm:{where} tp=2", "--target", "tp=1")
        assert found["targets"] == wanted["targets"]
    assert answer("--source", f"vllm:{path}", "--target", model)["good"]


def test_windows_of_later_layers_only():
    """`max_window_layers` is the first layer that slides, where `use_sliding_window` says so; else all slide."""
    config = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    mistral = from_config(config | {"model_type": "mistral", "sliding_window": 64}, "c")
    assert mistral.sliding == (0, 1, 2, 3, 4, 5)
    assert [group.kind for group in mistral.groups()] == ["sliding_window"]
    late = {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4}
    assert from_config(config | late, "c").sliding == (4, 5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": -1}, "num_key_value_heads"),
        ({"hidden_size": 4097}, "head_dim"),
        ({"torch_dtype": "int3"}, "int3"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 32}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window"),
        ({"ssm_state_size": 16}, "state"),
        ({"num_kv_shared_layers": 4}, "share"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 0}, "kv_lora_rank"),
        ({"model_type": "gpt2", "n_layer": 3}, "num_hidden_layers 32"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "newest", "frobs": 1}, "newest.*frobs"),
        ({"model_type": "newest", "text_config": {"num_hidden_layers": 3}}, "newest"),
        ({"model_type": "qwen2_vl", "num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "5 KV heads"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "dtype=fp8"),
    ],
)
def test_a_config_that_cannot_be_understood_is_refused(change: dict, says: str):
    """Fields that decide about the cache and are missing, malformed or unknown are named."""
    with pytest.raises(ConfigError, match=says):
        from_config(CONFIGS["llama"][0] | change, "config.json")


# -- questions that make no sense: exit code 2, one sentence ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--source and --target"),
        (["--source", "llama-3-8b"], "--source and --target"),
        (["--source", "llama-3-8b", "--model", "llama-3-8b"], "--model"),
        (["--source", "llama-3-8b", "--target", "tp=2", "--tp", "4"], "tp=4"),
        (["--model", "lama-3-8b"], "did you mean llama-3-8b"),
        (["--model", "vllm:nowhere"], "nowhere"),
        (["--model", "vllm:/dev"], "/dev/config.json"),
        (["--model", "qwen3-next"], "unknown model 'qwen3-next'; known are"),
        (["--model", "deepseek-v3.2"], "unknown model 'deepseek-v3.2'; known are"),
        (["--model", "mistral-7b-v0.1"], "unknown model 'mistral-7b-v0.1'"),
        (["--model", "nowhere.json"], "nowhere.json"),
        (["--model", ""], "begins with a model"),
        (["--model", "'unclosed"], "quotation"),
        (["--model", "llama-3-8b frobs=3"], "frobs"),
        (["--model", "llama-3-8b tp=2 tp=4"], "twice"),
        (["--model", "llama-3-8b", "--tp", "3"], "do not share 8 KV heads"),
        (["--model", "llama-3-8b", "--tp", "0"], "tp"),
        (["--model", "llama-3-8b", "--tp", "1e3"], "whole number"),
        (["--model", "llama-3-8b", "--pp", "33"], "32 layers"),
        (["--model", "llama-3-8b", "--tp", "32", "--pp", "16"], "ranks"),
        (["--model", "llama-3-8b", "--order", "ABC"], "ABC"),
        (["--model", "llama-3-8b", "--block", "16", "--kernel-block", "5"], "no multiple"),
        (["--model", "llama-3-8b", "--dtype", "int3"], "int3"),
        (["--model", "llama-3-8b", "--apart", "perhaps"], "yes or no"),
        (["--model", "llama-3-8b", "--blocks", "3"], "256 blocks"),
        (["--model", "llama-3-8b", "--head-dim", "1048576", "--layers", "1048576", "--blocks", "9999999"], "no cache"),
        (["--model", "deepseek-v3", "--heads", "4"], "latent"),
        (["--model", "llama-3-8b", "--fingerprint", "ä"], "fingerprint"),
        (["--model", "llama-3-8b", "--tokens", "-1"], "--tokens"),
        (["--model", "llama-3-8b", "--tokens", str(MAX_TOKENS + 1)], "--tokens"),
        (["--model", "llama-3-8b", "--tokens", "9" * 5000], "--tokens"),
        (["--model", "llama-3-8b", "--tokens", "5", "--from-token", "5"], "--from-token"),
        (["--model", "llama-3-8b", "--seed", "x"], "--seed"),
        (["--model", "llama-3-8b", "--rank", "1"], "no rank 1"),
        (["--model", "llama-3-8b", "--slot-mib", "0"], "--slot-mib"),
        (["--model", "llama-3-8b", "--costs", "nowhere"], "nowhere"),
        (["--model", "llama-3-8b", "--picture", "a.gif"], "a.gif"),
        (["--model", "llama-3-8b", "--picture", "nowhere/a.png"], "no folder"),
    ],
)
def test_a_question_that_makes_no_sense_is_one_sentence(arguments: list[str], says: str):
    """Exit code 2, nothing on stdout, one line on stderr that names what is wrong."""
    code, out, err = ask(*arguments)
    assert (code, out) == (2, "") and says.lower() in err.lower() and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds neither"),
        (b"{", "holds neither"),
        (b"[]", "empty list"),
        (b"\xff\xfe", "holds neither"),
        (b"[" * 100_000, "holds neither"),
        (b'{"num_hidden_layers": 3}', "write vllm:"),
        (b'{"model_type": "llama"}', "write vllm:"),
        (b'{"groups": [], "dtype": "bfloat16", "layers": [0, 1, 1]}', "groups"),
        (b'{"groups": 3}', "holds neither"),
    ],
)
def test_a_file_that_holds_no_specs_is_one_sentence(content: bytes, says: str, tmp_path):
    """A file without specs is refused in one line, for any content."""
    path = tmp_path / "specs.json"
    path.write_bytes(content)
    for other in ("llama-3-8b", str(path)):
        code, out, err = ask("--source", str(path), "--target", other)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err


def test_specs_that_do_not_belong_together_are_refused(tmp_path):
    """Two specs of one rank, or of two models, are no engine."""
    path = tmp_path / "specs.json"
    one = specs_of("tiny")[0]
    for pair, says in (([one, one], "one rank"), ([one, msgspec.structs.replace(one, rank=1, world=2, fingerprint="y")], "models")):  # fmt: skip
        path.write_bytes(msgspec.json.encode(pair))
        code, _, err = ask("--source", str(path), "--target", "tiny")
        assert code == 2 and says in err


_KEYS = st.sampled_from([option.key for option in OPTIONS])
_VALUES = st.one_of(
    st.integers(-2, 40).map(str),
    st.integers(-(1 << 70), 1 << 70).map(str),
    st.sampled_from(["HND", "nhd", "BLHNC", "yes", "no", "fp8", "bf16", "", "nan", "1e9", "0x10"]),
    st.text(max_size=8),
)
_SIDES = st.one_of(
    st.text(max_size=30),
    st.tuples(
        st.sampled_from(["tiny", "gpt-oss-20b", "deepseek-v2-lite", "layers=2 heads=4 head_dim=8", "", "vllm:x", "a.json"]),
        st.lists(st.tuples(_KEYS, _VALUES).map("=".join), max_size=3),
    ).map(lambda side: " ".join([side[0], *side[1]])),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(source=_SIDES, target=_SIDES, numbers=st.tuples(_VALUES, _VALUES))
def test_no_shorthand_makes_it_stumble(source: str, target: str, numbers: tuple[str, str]):
    """Any two texts are answered, refused, or turned away in one line."""
    arguments = [f"--source={source}", f"--target={target}", f"--tokens={numbers[0]}", f"--seed={numbers[1]}"]
    code, out, err = ask(*arguments)
    assert code in (0, 1, 2) and (err == "" if code < 2 else out == "" and len(err.splitlines()) == 1), err


_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
_JSON = st.recursive(
    _LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4))
)  # fmt: skip
_CONFIG_KEYS = st.sampled_from(
    ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "kv_lora_rank",
     "qk_rope_head_dim", "layer_types", "sliding_window", "torch_dtype", "sliding_window_pattern", "text_config",
     "max_window_layers", "use_sliding_window"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(change=st.dictionaries(_CONFIG_KEYS, st.one_of(_JSON, st.integers(1, 64)), max_size=4))
def test_no_config_makes_it_stumble(change: dict):
    """A config.json with anything in it is a model or a ConfigError."""
    try:
        model = from_config(CONFIGS["llama"][0] | change, "config.json")
    except ConfigError:
        return
    assert sorted(n for group in model.groups() for n in group.layers) == list(range(model.layers))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_file_of_specs_makes_it_stumble(data: st.DataObject, tmp_path_factory):
    """Specs with anything in place of one of their fields are answered, refused, or turned away in one line."""
    held = json.loads(msgspec.json.encode(specs_of("tiny tp=2")))
    at: object = held
    for _ in range(data.draw(st.integers(0, 6))):
        if not isinstance(at, (list, dict)) or not at:
            break
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (list, dict)) or data.draw(st.booleans()):
            at[key] = data.draw(st.one_of(_JSON, st.integers(0, 1 << 64)))
            break
        at = at[key]
    path = tmp_path_factory.mktemp("specs") / "a.json"
    path.write_text(json.dumps(held))
    code, _, err = ask("--source", str(path), "--target", "tiny", "--tokens", "8")
    assert code in (0, 1) or (code == 2 and len(err.splitlines()) == 1), err


# -- shorthands ---------------------------------------------------------------------------------------------------------


def test_made_up_memory_does_not_overlap():
    """No two allocations of a side share a byte, whatever the order of the axes."""
    for order in KVLayout:
        specs = specs_of(f"gemma-2-9b tp=4 pp=2 apart block=32 kernel_block=16 order={order.value}")
        regions = sorted((region.address, region.end) for spec in specs for region in spec.regions)
        assert all(a[1] <= b[0] for a, b in pairwise(regions))
        assert {region.layout for spec in specs for region in spec.regions} == {order}


def test_words_and_options_are_the_same():
    """Each word of a side has its reader and its place, and the help names each of them."""
    assert [field.name for field in fields(Words)] == [option.key for option in OPTIONS]
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    for option in OPTIONS:
        assert f"{option.key}=" in out.getvalue()
    for model in MODELS:
        assert model in out.getvalue()


def test_numbers_are_written_as_people_do():
    """Neighbours are a range, and a long regular list is cut."""
    assert ranges([3, 1, 2, 2]) == "1-3"
    assert ranges([0, 1, 5]) == "0-1, 5"
    assert ranges(range(0, 20, 2)) == "0, 2, ... 18"


# -- pictures -----------------------------------------------------------------------------------------------------------

PAIRS = [
    ("tiny heads=8", "order=NHD"),
    ("llama-3-8b tp=4", "tp=1"),
    ("llama-3-8b tp=1", "tp=4"),
    ("tiny block=48", "block=32"),
    ("tiny block=256", "block=512"),
    ("tiny apart", "apart=no"),
    ("tiny apart order=NHD", "order=BHLNC block=32 kernel_block=16"),
    ("llama-2-7b pp=2 order=BLHNC", "pp=1 order=LHBNC"),
    ("deepseek-v3 tp=4", "tp=1 block=64"),
    ("gemma-2-9b", "tp=8"),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize(
    "request_", [PlannedRequest(200), PlannedRequest(200, 37, fragmented=True)], ids=["whole", "scattered"]
)
def test_a_picture_shows_what_is_moved(source: str, target: str, request_: PlannedRequest):
    """Each run that is drawn lies inside a descriptor of the plan, at the same place of both sides; cells never overlap."""
    here = written(source)
    sides = same_model(read_side(here, 200), read_side(written(target, here), 200, first_address=1 << 60))
    spec = sides[1].specs[-1]
    bound = matched(*sides, spec, request_, convert=False)
    shown = window(bound)
    descriptors = {part.source.rank: part.descriptors(match) for part, match in bound}
    assert shown.runs
    for run in shown.runs:
        a, b = run.source_cells[0], run.target_cells[0]
        made = descriptors[run.source[0]]
        offset = a.address - made.remote.astype(int)
        inside = (offset >= 0) & (offset + run.nbytes <= made.nbytes.astype(int))
        assert (made.local.astype(int)[inside] + offset[inside] == b.address).any()
    for strip in (*shown.sources.values(), *shown.targets.values()):
        assert all(x.end <= y.address for x, y in pairwise(strip.cells))
        assert any(cell.origin >= 0 for cell in strip.cells)
    assert sum(len(run.source_cells) for run in shown.runs) <= MOST_CELLS


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_picture_is_written(name: str, tmp_path):
    """The file is there, it is a picture, and the text says what it shows."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / name
    code, out, err = ask("--model", "tiny", "--apart", "--to-apart", "no", "--to-block", "32", "--picture", str(path))
    assert (code, err) == (0, "")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" if name == "a.png" else b"<svg" in path.read_bytes()
    assert f"{path}: layer 0 of 4, tokens 0-31 of the request, KV heads 0-1 of 2" in out


@pytest.mark.parametrize("by", picture.MEANINGS)
def test_colours_can_mean_each_of_them(by: str, tmp_path):
    """Each meaning of colours can be drawn."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "a.png"
    assert ask("--model", "tiny", "--picture", str(path), "--picture-by", by)[0] == 0
    assert path.stat().st_size > 10_000


def test_no_picture_is_drawn_of_what_is_refused(tmp_path):
    """A refusal is all that is said."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "a.png"
    assert ask("--model", "tiny", "--to-dtype", "fp8", "--picture", str(path))[0] == 1
    assert not path.exists()


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    """Exit code 2 and one sentence, before anything is computed."""
    monkeypatch.setattr(picture, "find_spec", lambda _name: None)
    code, out, err = ask("--model", "tiny", "--picture", str(tmp_path / "a.png"))
    assert (code, out) == (2, "") and "pip install 'kvxfer[cli]'" in err and err.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    """A folder in place of the file is named."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "a.png"
    path.mkdir()
    code, _, err = ask("--model", "tiny", "--picture", str(path))
    assert code == 2 and "cannot write" in err


# -- the page about it --------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent.parent / "docs" / "plan.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"^\$ kvxfer plan (.*)$", PAGE, re.MULTILINE))
def test_commands_of_the_page_are_followed_literally(line: str, tmp_path, monkeypatch):
    """Each command of docs/plan.md runs, with the files that the page makes, and says the lines that the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVXFER_COSTS", raising=False)
    if "--picture" in line:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for program in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(program, {})
    code, out, err = ask(*shlex.split(line.split(" | ", maxsplit=1)[0]))
    assert (code, err) == (int("refused   " in out), "")
    # Not the times: they change with the constants of the cost model.
    shown = [each for each in out.splitlines() if each.startswith(("model", "source", "target", "request", "refused"))]
    assert ("picture   " in out and out.splitlines()[-1] in PAGE) or all(each in PAGE for each in shown)
