# SPDX-License-Identifier: Apache-2.0
"""Identity of checkpoints by their content: files of any division are equal, other content is not."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.errors import ConfigError
from kvxfer_serving.checkpoint import Checkpoint, sample_offsets

TENSORS = {
    f"model.layers.{i}.self_attn.{name}.weight": ("F32", (64, 96), bytes((i * 31 + n * 7 + b) % 251 for b in range(24_576)))
    for i in range(3)
    for n, name in enumerate(("q_proj", "k_proj", "v_proj"))
} | {"model.norm.weight": ("BF16", (8,), b"0123456789abcdef"), "empty": ("F32", (0,), b"")}  # fmt: skip


def write_file(path, tensors):
    """Write a safetensors file."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def write_sharded(folder, shards):
    """Write files of so many tensors, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number:05}.safetensors"
        write_file(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def digest(folder):
    return Checkpoint.of(folder).digest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint in one file, and its digest."""
    folder = tmp_path_factory.mktemp("whole")
    write_file(folder / "model.safetensors", TENSORS)
    return digest(folder)


@given(st.permutations(list(TENSORS)), st.lists(st.integers(0, len(TENSORS)), max_size=5), st.integers(0, 1 << 60))
def test_any_division_of_the_tensors_into_files_is_the_same_checkpoint(tmp_path_factory, whole, order, cuts, number):
    """The order of tensors, and the files that they are divided into, make no difference."""
    folder = tmp_path_factory.mktemp(f"shards{number}")
    bounds = [0, *sorted(cuts), len(order)]
    shards = [{name: TENSORS[name] for name in order[a:b]} for a, b in pairwise(bounds)]
    write_sharded(folder, shards)
    assert digest(folder) == whole


@given(st.sampled_from(sorted(TENSORS)), st.integers(0, 7), st.integers(1, 255), st.data())
def test_one_sampled_byte_makes_another_checkpoint(tmp_path_factory, whole, name, sample, change, data):
    """A change of any sampled byte, of the name, the dtype or the shape of any tensor makes another identity."""
    dtype, shape, content = TENSORS[name]
    what = data.draw(st.sampled_from(("byte", "name", "dtype", "shape")))
    changed = dict(TENSORS)
    if what == "byte" and content:
        samples = sample_offsets(len(content), 8)
        begin, length = samples[sample % len(samples)]
        at = begin + data.draw(st.integers(0, length - 1))
        changed[name] = (dtype, shape, content[:at] + bytes([content[at] ^ change]) + content[at + 1 :])
    elif what == "name":
        changed[f"{name}.other"] = changed.pop(name)
    elif what == "dtype":
        changed[name] = ("I32", shape, content)
    else:
        changed[name] = (dtype, (1, *shape), content)
    folder = tmp_path_factory.mktemp("changed")
    write_file(folder / "model.safetensors", changed)
    assert digest(folder) != whole


@given(st.integers(0, 1 << 40), st.integers(1, 8))
def test_samples_lie_within_a_tensor(nbytes, samples):
    """Samples of a tensor of any size lie within it, in ascending order, and are all of it where it is small."""
    found = sample_offsets(nbytes, samples)
    assert all(begin >= 0 and begin + length <= nbytes for begin, length in found)
    assert found == sorted(found)
    assert nbytes > samples * 4096 or found == [(0, nbytes)]


def test_an_index_says_which_files_and_tensors_belong_to_the_model(tmp_path, whole):
    """Files beside those of the index, such as the same weights by other names, do not count."""
    write_sharded(tmp_path, [TENSORS])
    write_file(tmp_path / "consolidated.safetensors", {"other": ("F32", (1,), b"1234")})
    assert digest(tmp_path) == whole


def test_files_of_other_formats_and_folders_without_weights(tmp_path):
    """Other files are equal by their content whatever their names; a folder without weights, or without some, has no identity."""
    assert Checkpoint.of(tmp_path) is None
    (tmp_path / "a.gguf").write_bytes(b"GGUF" * 9000)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.gguf").write_bytes(b"GGUF" * 9000)
    assert digest(tmp_path / "a.gguf") == digest(tmp_path) == digest(tmp_path / "other")
    (tmp_path / "other" / "b.gguf").write_bytes(b"GGUF" * 8999 + b"GGUE")
    assert digest(tmp_path) != digest(tmp_path / "other")
    write_sharded(tmp_path / "partly", [{"a": TENSORS["empty"]}, {"b": TENSORS["empty"]}])
    (tmp_path / "partly" / "model-00001.safetensors").unlink()
    assert Checkpoint.of(tmp_path / "partly") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (10).to_bytes(8, "little") + b'{"a": {}} ',
        (2).to_bytes(8, "little") + b"{{",
    ],
)
def test_a_file_that_is_none(tmp_path, content):
    """A file that is no safetensors file is an error with its path."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        Checkpoint.of(tmp_path)


def test_a_file_that_ends_too_early(tmp_path):
    """A file that was not copied to its end is an error with its path."""
    path = tmp_path / "model.safetensors"
    write_file(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        digest(tmp_path)


def test_a_checkpoint_of_100_gigabytes_takes_little_time(tmp_path):
    """The time depends on the number of tensors, not on their size: 1,000 tensors of 100 MB (of sparse files) take at most 5 seconds."""
    size, shards = 100_000_000, []
    for shard in range(10):
        header = {f"{shard}.{i}": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]} for i in range(100)}  # fmt: skip
        text = json.dumps(header).encode()
        path = tmp_path / f"model-{shard}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with path.open("r+b") as file:
            file.truncate(8 + len(text) + 100 * size)
        shards.append(path)
    begun = time.monotonic()
    assert digest(tmp_path).startswith("safetensors ")
    assert time.monotonic() - begun < 5
