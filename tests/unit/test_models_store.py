"""Every kind of `model.id`, resolved or refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer

from cluster.models.store import ModelError, place_on_node, resolve
from cluster.topology.schema import ModelSpec


def quiet(what: str, part: float | None) -> None:
    pass


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(home):
    place = home / "mine"
    place.mkdir()
    (place / "config.json").write_text('{"max_position_embeddings": 512}')
    (place / "pytorch_model.bin").write_bytes(b"x")
    return place


@pytest.fixture
def simulated():
    return resolve(ModelSpec(id="simulated"), quiet)


def test_a_hub_id_is_passed_through():
    spec = ModelSpec(id="zai-org/GLM-5.2-FP8", revision="abc", max_model_len_tokens=1000)
    found = resolve(spec, quiet)
    assert (found.path, found.is_local, found.config) == ("zai-org/GLM-5.2-FP8", False, {})
    assert found.digest == "hub:zai-org/GLM-5.2-FP8@abc"
    assert found.max_model_len_tokens == 1000


def test_a_hub_id_without_a_length_says_what_to_give():
    with pytest.raises(ModelError, match=r"no folder here.*give model\.max_model_len_tokens"):
        resolve(ModelSpec(id="zai-org/GLM-5.2-FP8"), quiet)


@pytest.mark.parametrize("id_of", [str, lambda place: "./mine", lambda place: "mine"])
def test_a_folder_is_found_by_absolute_and_relative_path(folder, id_of):
    found = resolve(ModelSpec(id=id_of(folder)), quiet)
    assert (found.path, found.is_local) == (str(folder), True)
    assert found.max_model_len_tokens == 512


@pytest.mark.parametrize("missing", ["/no/such/model", "./nothing", "a/b/c", "~/none-such"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(missing):
    with pytest.raises(ModelError, match="no such folder"):
        resolve(ModelSpec(id=missing, max_model_len_tokens=10), quiet)


def test_the_stated_length_wins(folder):
    spec = ModelSpec(id=str(folder), max_model_len_tokens=100)
    assert resolve(spec, quiet).max_model_len_tokens == 100


def test_the_length_of_a_multimodal_config_is_found(folder):
    config = {"text_config": {"max_position_embeddings": 77}}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve(ModelSpec(id=str(folder)), quiet).max_model_len_tokens == 77


def test_a_config_without_length_needs_a_stated_one(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"give model\.max_model_len_tokens"):
        resolve(ModelSpec(id=str(folder)), quiet)


@pytest.mark.parametrize("model", ["simulated", "smollm2-135m-instruct", "mine"])
def test_a_revision_of_what_has_none_is_refused(folder, model):
    with pytest.raises(ModelError, match="has no revision 'v2'"):
        resolve(ModelSpec(id=model, revision="v2"), quiet)


def test_simulated_has_one_token_per_byte(simulated):
    tokenizer = Tokenizer.from_file(f"{simulated.path}/tokenizer.json")
    every_byte = "".join(map(chr, range(0x250))) + "\u4f60\U0001f600"
    ids = tokenizer.encode(every_byte).ids
    assert ids == [byte + 3 for byte in every_byte.encode()]
    assert tokenizer.decode(ids) == every_byte
    assert tokenizer.encode("<pad><bos>x<eos>").ids == [0, 1, ord("x") + 3, 2]
    assert simulated.max_model_len_tokens == 131_072


def test_simulated_decodes_every_single_byte(simulated):
    tokenizer = Tokenizer.from_file(f"{simulated.path}/tokenizer.json")
    assert tokenizer.get_vocab_size() == 259
    assert [tokenizer.decode([byte + 3]) for byte in range(128)] == [chr(b) for b in range(128)]


def test_simulated_renders_a_chat(simulated):
    config = json.loads(Path(simulated.path, "tokenizer_config.json").read_bytes())
    messages = [{"role": "user", "content": "hi"}]
    text = jinja2.Template(config["chat_template"]).render(
        messages=messages, add_generation_prompt=True
    )
    assert text == "<bos>user: hi\nassistant: "


def test_model_error_keeps_its_fields_when_pickled():
    error = pickle.loads(pickle.dumps(ModelError("m", "found", "fix")))
    assert (error.model, error.found, error.fix) == ("m", "found", "fix")
    assert str(error) == "model m: found; fix"


def test_a_builtin_that_another_node_made_is_made_here_too_and_once(home, monkeypatch):
    there = resolve(ModelSpec(id="simulated"), quiet)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "here"))
    said: list[str] = []
    Path(there.path).rename(home / "not-here")

    def ask() -> str:
        return place_on_node(
            ModelSpec(id="simulated"),
            there.path,
            there.digest,
            "10.0.0.6",
            lambda what, _part: said.append(what),
        )

    assert Path(ask()).parent == home / "here/pdcluster/models"
    assert said == ["writing"]
    assert ask() == str(home / "here/pdcluster/models/simulated-1")
    assert said == ["writing"]


def test_a_builtin_that_is_at_the_same_place_here_is_used_there(simulated):
    spec = ModelSpec(id="simulated")
    assert place_on_node(spec, simulated.path, simulated.digest, "here", quiet) == simulated.path


@pytest.mark.parametrize("digest", ["0" * 64, "id:/no/such/model@main"])
def test_a_folder_that_a_node_lacks_is_named_with_the_node_and_the_fix(digest):
    with pytest.raises(ModelError) as caught:
        place_on_node(ModelSpec(id="/no/such/model"), "/no/such/model", digest, "10.0.0.6", quiet)
    assert str(caught.value) == (
        "model /no/such/model: is missing on node 10.0.0.6; copy the model there: it must be at "
        "this path on every node that its pools may use; `pdcluster doctor FILE` looks at all of "
        "them"
    )


def test_a_folder_must_be_the_one_that_up_saw(folder):
    spec = ModelSpec(id=str(folder))
    seen = resolve(spec, quiet)
    assert place_on_node(spec, seen.path, seen.digest, "10.0.0.6", quiet) == str(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cut")
    with pytest.raises(
        ModelError, match=r"another model on node 10\.0\.0\.6 .* header of a weight"
    ):
        place_on_node(spec, seen.path, seen.digest, "10.0.0.6", quiet)


def test_a_pools_own_folder_that_up_did_not_look_at_is_taken_as_it_is(folder):
    digest = f"id:{folder}@main"
    spec = ModelSpec(id=str(folder))
    assert place_on_node(spec, str(folder), digest, "10.0.0.6", quiet) == str(folder)


def test_a_hub_id_goes_through_to_the_engine():
    spec = ModelSpec(id="zai-org/GLM-5.2-FP8")
    digest = "hub:zai-org/GLM-5.2-FP8@main"
    assert place_on_node(spec, spec.id, digest, "10.0.0.6", quiet) == spec.id
