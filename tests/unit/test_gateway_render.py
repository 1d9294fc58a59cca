"""Local rendering: what it covers, and when it is trusted."""

from __future__ import annotations

import orjson
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from cluster.errors import NoCapacity
from cluster.gateway.errors import ApiError, Rejected
from cluster.gateway.render import CannotRender, Renderer, Trust
from cluster.gateway.requests import Endpoint, parse
from cluster.gateway.templates import ModelTemplates, NotCovered

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}\n"
    "[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}({{ call.function.name }}:"
    "{{ call.function.arguments | tojson }}){% endfor %}"
    "{% if message.role == 'user' and message.content == 'refuse' %}"
    "{{ raise_exception('no <such> thing') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if thinking is defined %}{{ thinking }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer whose ids are easy to make."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index + 1 for index, letter in enumerate(alphabet)} | {"<s>": 0}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.enable_truncation(8)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    return path


@pytest.fixture(scope="module")
def templates(folder):
    return ModelTemplates.load(folder)


def text_of(templates, *messages, **more) -> str:
    return templates.chat_text({"messages": list(messages), **more}, "string")


def user(content, **more):
    return {"role": "user", "content": content, **more}


def test_messages_are_prepared_as_the_engine_prepares_them(templates):
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"b": "é<", "a": 1}'},
    }
    text = text_of(
        templates,
        user([{"type": "text", "text": "a"}, "b"]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "x"}], "tool_call_id": "1"},
    )
    assert text == '<s>[user]a\nb[assistant](f:{"b": "é<", "a": 1})[tool]x[assistant]'


def test_parts_are_kept_for_templates_that_loop_over_them(templates):
    body = {"messages": [user("a")]}
    assert "[{'type': 'text', 'text': 'a'}]" in templates.chat_text(body, "parts")


def test_generation_prompt_and_template_variables(templates):
    assert text_of(templates, user("a"), add_generation_prompt=False) == "<s>[user]a"
    more = {"chat_template_kwargs": {"thinking": "on"}}
    assert text_of(templates, user("a"), **more).endswith("[assistant]on")


@pytest.mark.parametrize(
    "body",
    [
        {"chat_template": "x"},
        {"documents": [{"title": "a"}]},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"unknown": 1}},
        {"truncate_prompt_tokens": 5},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        {"messages": [{"role": "developer", "content": "a"}]},
        {"messages": [user([{"type": "image_url", "image_url": {}}])]},
        {"messages": [user("a", task="x")]},
        {"messages": [{"role": "system", "content": "x-anthropic-billing-header: 1\nb"}]},
    ],
)
def test_what_is_not_reproduced_is_left_to_the_engine(templates, body):
    with pytest.raises(NotCovered):
        templates.chat_text({"messages": [user("a")], **body}, "string")


def test_template_that_refuses_is_a_400_in_its_own_words(templates):
    with pytest.raises(ApiError, match="no <such> thing") as caught:
        text_of(templates, user("refuse"))
    assert caught.value.status == 400


def test_templates_cannot_reach_into_python(folder, templates):
    unsafe = ModelTemplates(
        templates._encoder._tokenizer, {"default": "{{ messages.__class__.__mro__ }}"}, {}
    )
    with pytest.raises(ApiError):
        text_of(unsafe, user("a"))


def test_tokenizers_own_truncation_is_off(templates):
    assert len(templates.encode("<s>naïve 日本 " * 50, True)) > 500


def test_folder_without_a_fast_tokenizer_is_not_covered(tmp_path):
    with pytest.raises(NotCovered):
        ModelTemplates.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(NotCovered):
        ModelTemplates.load(tmp_path)


class FakeEngine:
    """Renders as the local path does, unless told otherwise."""

    def __init__(self, templates, form="string") -> None:
        self._templates = templates
        self._form = form
        self.asked = 0
        self.raises: Exception | None = None
        self.knows_tools = True
        self.joins_with = "\n"

    async def render(self, endpoint, body, request_id, trace=""):
        self.asked += 1
        self.told = (request_id, trace)
        if self.raises is not None:
            raise self.raises
        if endpoint is Endpoint.COMPLETIONS:
            return [self._templates.encode(body["prompt"], True)]
        if not self.knows_tools and body.get("tools"):
            return [[1, 2, 3]]
        text = self._templates.chat_text(body, self._form)
        if any(isinstance(message["content"], list) for message in body["messages"]):
            text = text.replace("a\nb", f"a{self.joins_with}b")
        return [self._templates.encode(text, False)]


def chat(*messages, **more):
    return parse(Endpoint.CHAT, orjson.dumps({"messages": list(messages), **more}), "m")


@pytest.fixture
def reasons():
    return []


@pytest.fixture
def renderer_of(folder, reasons):
    return lambda engine: Renderer(str(folder), engine, reasons.append)


@pytest.mark.parametrize("form", ["string", "parts"])
async def test_trust_is_gained_by_agreement_and_spares_the_engine(
    templates, renderer_of, reasons, form
):
    engine = FakeEngine(templates, form)
    renderer = renderer_of(engine)
    before = await renderer.prompt_ids(chat(user("Hello")), "r1")
    assert reasons == ["unchecked"]
    assert engine.told == ("r1", "")
    await renderer.check()
    assert renderer.trust is Trust.TRUSTED
    asked = engine.asked
    assert await renderer.prompt_ids(chat(user("Hello")), "r1") == before
    assert engine.asked == asked


async def test_disagreement_is_for_ever(templates, renderer_of, reasons):
    engine = FakeEngine(templates)
    engine.joins_with = "\n"
    renderer = renderer_of(engine)
    engine._templates = ModelTemplates(templates._encoder._tokenizer, {"default": "other"}, {})
    await renderer.check()
    assert renderer.trust is Trust.REFUTED
    assert await renderer.prompt_ids(chat(user("Hello")), "r1") == [
        templates.encode("other", False)
    ]
    assert reasons == ["differs-from-engine"]


async def test_tools_and_parts_are_trusted_apart(templates, renderer_of, reasons):
    engine = FakeEngine(templates)
    engine.knows_tools = False
    engine.joins_with = ""
    renderer = renderer_of(engine)
    await renderer.check()
    assert renderer.trust is Trust.TRUSTED
    tool = {"type": "function", "function": {"name": "f"}}
    assert await renderer.prompt_ids(chat(user("Hello"), tools=[tool]), "r1") == [[1, 2, 3]]
    ids = (await renderer.prompt_ids(chat(user(["a", "b"])), "r1"))[0]
    assert ids == templates.encode("<s>[user]ab[assistant]", False)
    await renderer.prompt_ids(chat(user("Hello")), "r1")
    assert reasons == ["tools", "content-parts"]


async def test_check_that_found_no_engine_is_made_again(templates, renderer_of):
    engine = FakeEngine(templates)
    engine.raises = NoCapacity("none", 1.0)
    renderer = renderer_of(engine)
    with pytest.raises(NoCapacity):
        await renderer.check()
    assert renderer.trust is Trust.UNCHECKED
    engine.raises = None
    await renderer.check()
    assert renderer.trust is Trust.TRUSTED


async def test_engines_that_cannot_render_leave_the_local_path(templates, renderer_of):
    engine = FakeEngine(templates)
    engine.raises = CannotRender("no endpoint")
    renderer = renderer_of(engine)
    await renderer.check()
    assert renderer.trust is Trust.TRUSTED


async def test_engines_refusal_reaches_the_client(templates, renderer_of):
    engine = FakeEngine(templates)
    engine.raises = Rejected(400, b"{}", b"application/json")
    with pytest.raises(Rejected):
        await renderer_of(engine).prompt_ids(chat(user("Hello")), "r1")


async def test_token_ids_need_no_rendering(templates, renderer_of, reasons):
    request = parse(Endpoint.COMPLETIONS, b'{"prompt": [[1, 2], [3]]}', "m")
    assert await renderer_of(FakeEngine(templates)).prompt_ids(request, "r1") == [[1, 2], [3]]
    assert reasons == []


async def test_long_texts_are_the_same_in_a_thread(templates, renderer_of):
    renderer = renderer_of(FakeEngine(templates))
    await renderer.check()
    text = "Hello 日本 " * 2000
    ids = (await renderer.prompt_ids(chat(user(text)), "r1"))[0]
    assert ids == templates.encode(f"<s>[user]{text}[assistant]", False)
