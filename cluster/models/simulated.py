"""`simulated`: a model folder without a model, for the engine of that name.

Its tokenizer needs no vocabulary: the token id of byte b is b + 3, after <pad>, <bos> and <eos>.
So any text has as many tokens as UTF-8 bytes, and an engine can make and read ids by arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.models.progress import Progress

ID = "simulated"
REVISION = "1"
NEEDED_BYTES = 100_000

_SPECIAL = ("<pad>", "<bos>", "<eos>")
_CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def fill(folder: Path, progress: Progress) -> None:
    """Write the folder. Raises: OSError."""
    progress("writing", None)
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": ["Simulated"],
            "model_type": ID,
            "vocab_size": len(_SPECIAL) + 256,
            "max_position_embeddings": 131_072,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": _SPECIAL[0],
            "bos_token": _SPECIAL[1],
            "eos_token": _SPECIAL[2],
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8")


def _tokenizer() -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    letters = [*_SPECIAL, *_byte_letters()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **flags, "special": True}
            for index, token in enumerate(_SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: index for index, letter in enumerate(letters)},
            "merges": [],
        },
    }


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte, 0 to 255: the byte's own Latin-1
    character where that is printable, else the next unused one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
