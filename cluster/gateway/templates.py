"""Render and tokenise from a model folder, the way the engine does, for the common shapes.

What is reproduced here is the engine's own preparation of messages (content parts joined or kept,
tool arguments parsed, None dropped) and transformers' template environment. What is not, is
refused with `NotCovered` and left to the engine; `render` checks the rest against an engine's
answers before it is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from cluster.gateway import errors
from cluster.gateway.tokens import Encoder

ContentFormat = Literal["string", "parts"]

_ROLES = frozenset({"system", "user", "assistant", "tool"})
_MESSAGE_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content"}
)
_TOOL_KEYS = frozenset({"type", "function"})
_FUNCTION_KEYS = frozenset({"name", "description", "parameters"})
# Fields that change the prompt in ways only the engine knows.
_ENGINE_ONLY = (
    "chat_template",
    "documents",
    "truncate_prompt_tokens",
    "mm_processor_kwargs",
    "media_io_kwargs",
)
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# vLLM drops such a first line of a system message: it differs from request to request.
_ATTRIBUTION_HEADER = "x-anthropic-billing-header"


class NotCovered(Exception):
    """The local path does not reproduce this request; `str` is the reason, a metric label."""


class _Generation(jinja2.ext.Extension):
    """Templates may mark the assistant's words for training; for a prompt the mark is nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ModelTemplates:
    """The tokenizer and chat templates of one model folder. Thread-safe once made."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
    ) -> None:
        self._encoder = Encoder(tokenizer)
        environment = _environment()
        self._templates = {name: environment.from_string(text) for name, text in templates.items()}
        for template in self._templates.values():
            # jinja2 copies these for every rendering, and copies a ChainMap slowly: 8 us.
            template.globals = dict(template.globals)
        self._variables = {
            name: jinja2.meta.find_undeclared_variables(environment.parse(text))
            for name, text in templates.items()
        }
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ModelTemplates:
        """Raises: NotCovered if the folder has no fast tokenizer or one we cannot read."""
        tokenizer_file = folder / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise NotCovered("no-tokenizer-json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
            config = _read_json(folder / "tokenizer_config.json")
            special_tokens = _special_tokens(
                _read_json(folder / "special_tokens_map.json") | config
            )
            templates = _chat_templates(folder, config)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return cls(tokenizer, templates, special_tokens)
        except NotCovered:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise NotCovered("unreadable-tokenizer") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of `ids`, as an engine tells it."""
        return self._encoder.decode(ids, skip_special_tokens)

    def encode(self, text: str, add_special_tokens: bool, may_remember: bool = True) -> list[int]:
        """Token ids; other Python threads run meanwhile."""
        return self._encoder.encode(text, add_special_tokens, may_remember)

    def chat_text(self, body: Mapping[str, Any], content_format: ContentFormat) -> str:
        """A chat request's prompt. Raises: NotCovered; ApiError 400 if the template refuses."""
        for field in _ENGINE_ONLY:
            if body.get(field) is not None:
                raise NotCovered(field.replace("_", "-"))
        if body.get("continue_final_message"):
            raise NotCovered("continue-final-message")
        tools = body.get("tools")
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise NotCovered("no-chat-template")
        variables = self._template_variables(body, name)
        try:
            return template.render(
                **self._special_tokens,
                messages=[_message(message, content_format) for message in body["messages"]],
                tools=None if tools is None else [_tool(tool) for tool in tools],
                documents=None,
                **variables,
            )
        except jinja2.TemplateError as error:
            raise errors.bad_request(f"The chat template: {error}", param="messages") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise errors.bad_request(
                f"The chat template cannot render these messages: {error}", param="messages"
            ) from error

    def _template_variables(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Keyword arguments for the template: the request's own, as far as the template has a
        use for them."""
        given = body.get("chat_template_kwargs") or {}
        known = self._variables[name]
        if not isinstance(given, dict) or not given.keys() <= known:
            raise NotCovered("chat-template-kwargs")
        generation = body.get("add_generation_prompt")
        variables: dict[str, Any] = dict(given)
        variables["add_generation_prompt"] = True if generation is None else bool(generation)
        effort = body.get("reasoning_effort")
        if effort is not None:
            if "reasoning_effort" in known:
                variables["reasoning_effort"] = effort
            if "enable_thinking" in known and "enable_thinking" not in given:
                variables["enable_thinking"] = effort != "none"
        return variables


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML; a model was trained on plain JSON.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as transformers has it


def _message(message: Mapping[str, Any], content_format: ContentFormat) -> dict[str, Any]:
    role = message["role"]
    if role not in _ROLES:
        raise NotCovered("unusual-role")
    if not message.keys() <= _MESSAGE_KEYS:
        raise NotCovered("unusual-message-field")
    parts = _text_parts(message.get("content"))
    if role == "system" and any(text.startswith(_ATTRIBUTION_HEADER) for text in parts):
        raise NotCovered("attribution-header")
    rendered: dict[str, Any] = {"role": role}
    if content_format == "parts" and role != "tool":
        rendered["content"] = [{"type": "text", "text": text} for text in parts]
    else:
        rendered["content"] = "\n".join(parts)
    if role == "assistant":
        if message.get("tool_calls"):
            rendered["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        if reasoning is not None:
            rendered["reasoning"] = reasoning
            rendered["reasoning_content"] = reasoning
    elif role == "tool" and "tool_call_id" in message:
        rendered["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        rendered["name"] = message["name"]
    return rendered


def _text_parts(content: Any) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise NotCovered("unusual-content")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
            part = part["text"]
        if not isinstance(part, str):
            raise NotCovered("unusual-content")
        texts.append(part)
    return texts


def _tool_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or not call.keys() <= {"id", "type", "function"}:
        raise NotCovered("unusual-tool-call")
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise NotCovered("unusual-tool-call")
    if not function.keys() <= {"name", "arguments"}:
        raise NotCovered("unusual-tool-call")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = {}
    function = {**function, "arguments": arguments if isinstance(arguments, dict) else {}}
    return {**call, "function": function}


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or not tool.keys() <= _TOOL_KEYS:
        raise NotCovered("unusual-tool")
    function = tool.get("function")
    if not isinstance(function, dict) or not function.keys() <= _FUNCTION_KEYS:
        raise NotCovered("unusual-tool")
    return {
        "type": "function",
        "function": {
            "name": function.get("name"),
            "description": function.get("description"),
            "parameters": function.get("parameters"),
        },
    }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    loaded = json.loads(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        templates = {"default": own_file.read_text(encoding="utf-8")}
        for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[extra.stem] = extra.read_text(encoding="utf-8")
        return templates
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {}
