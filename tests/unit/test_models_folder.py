"""A local model folder: what is refused, by which words, and what the digest sees."""

from __future__ import annotations

import json
import struct

import pytest

from cluster.models.errors import ModelError
from cluster.models.folder import inspect


def safetensors(values: bytes, names: tuple[str, ...] = ("weight",)) -> bytes:
    tensors = {"__metadata__": {"format": "pt"}}
    for index, name in enumerate(names):
        size = len(values) // len(names)
        tensors[name] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [index * size, (index + 1) * size],
        }
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + values


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "some-model"
    place.mkdir()
    (place / "config.json").write_text('{"max_position_embeddings": 512}')
    (place / "model.safetensors").write_bytes(safetensors(b"abcdefgh"))
    return place


def test_a_whole_folder_gives_its_config(folder):
    assert inspect(folder).config == {"max_position_embeddings": 512}


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere: no such folder; correct model\.id"):
        inspect(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused(folder):
    with pytest.raises(ModelError, match=r"is a file; give the folder"):
        inspect(folder / "model.safetensors")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"some-model: config\.json cannot be read: No such file"):
        inspect(folder)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[1]", b""])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config\.json is not (JSON|a JSON object)"):
        inspect(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"some-model: no weights"):
        inspect(folder)
    assert inspect(folder, needs_weights=False).digest


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda good: good[:-1], r"has \d+ bytes where its header says \d+"),
        (lambda good: good + b"x", r"has \d+ bytes where its header says \d+"),
        (lambda good: good[:20], r"says its header has \d+ bytes, in a file of 20"),
        (lambda good: b"", r"has 0 bytes"),
        (lambda good: b"\xff" * 64, r"says its header has \d+ bytes"),
        (lambda good: struct.pack("<Q", 16) + b"x" * 16, r"is not JSON"),
        (lambda good: struct.pack("<Q", 8) + b'{"a": 1}', r"tensor without data_offsets"),
        (lambda good: b"version https://git-lfs.github.com/spec/v1\n", r"git lfs pull"),
    ],
    ids=["cut", "longer", "no-header", "empty", "noise", "no-json", "no-offsets", "lfs"],
)
def test_damaged_weights_are_refused_by_file_name(folder, damage, words):
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ModelError, match=rf"some-model: model\.safetensors .*{words}"):
        inspect(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(safetensors(b"abcd"))
    with pytest.raises(ModelError, match=r"1 of the 2 weight files .* first model-2\.safetensors"):
        inspect(folder)
    (folder / "model-2.safetensors").write_bytes(safetensors(b"efgh"))
    assert inspect(folder)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        inspect(folder)


def test_weights_of_older_formats_are_accepted(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert inspect(folder).digest


def test_digest_is_equal_for_equal_folders_wherever_they_are(folder, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert inspect(other).digest == inspect(folder).digest


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "config.json").write_text('{"max_position_embeddings": 513}'),
        lambda place: (place / "model.safetensors").rename(place / "other.safetensors"),
        lambda place: (place / "model.safetensors").write_bytes(safetensors(b"abcdefghij")),
        lambda place: (place / "model.safetensors").write_bytes(safetensors(b"abcdefgh", ("v",))),
    ],
    ids=["config", "name", "size", "header"],
)
def test_digest_sees_config_and_name_size_and_header_of_weights(folder, change):
    before = inspect(folder).digest
    change(folder)
    assert inspect(folder).digest != before
