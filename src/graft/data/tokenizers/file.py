"""A tokenizer read from a ``tokenizer.json`` or a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graft.data.tokenizers.file_config import FileTokenizerConfig
from graft.data.tokenizers.hugging_face import TOKENIZER_FILE, HuggingFaceTokenizer
from graft.errors import DataError

DEFAULT_END = "<|endoftext|>"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")


class FileTokenizer(HuggingFaceTokenizer):
    """Any tokenizer of the tokenizers library. The end-of-document token is, in this order: ``end_of_document`` of the
    config, ``eos_token`` of tokenizer_config.json or special_tokens_map.json beside the file, ``<|endoftext|>``."""

    config: FileTokenizerConfig

    def __init__(self, config: FileTokenizerConfig):
        super().__init__(config)
        given = Path(config.path)
        path = given / TOKENIZER_FILE if given.is_dir() else given
        try:
            raw = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the tokenizer cannot be read: {error}",
                where=str(path),
                expected="a tokenizer.json, or a folder that holds one",
                fix="correct data.tokenizer.path",
            ) from error
        end = config.end_of_document or _eos_token(path.parent) or DEFAULT_END
        self.load(raw, end, str(path))


def _eos_token(folder: Path) -> str | None:
    """``eos_token`` of a Hugging Face folder's settings: a string, or an object with ``content``."""
    for name in SETTINGS_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"invalid JSON: {error}", where=str(path), fix="repair or remove the file") from error
        token = settings.get("eos_token") if isinstance(settings, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None
