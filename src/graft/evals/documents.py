"""Documents to be scored, from text and from a run's held-out tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from graft.data.store import TokenStore
from graft.data.tokenizers.base import Tokenizer
from graft.errors import DataError
from graft.evals.perplexity import TokenDocument


def text_document(tokenizer: Tokenizer, text: str) -> TokenDocument:
    """One text as one document. Raises DataError when the tokenizer cannot write it."""
    (token_ids,) = tokenizer.encode_batch([text])
    return TokenDocument(token_ids, len(text.encode("utf-8")), len(text))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is no UTF-8", where=str(path), fix="convert the file to UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def stored_documents(store: TokenStore, tokenizer: Tokenizer) -> Iterator[TokenDocument]:
    """The documents of a token store."""
    token_bytes = tokenizer.token_bytes()
    for index in range(store.num_documents):
        token_ids = store.document(index)[1:]  # the end-of-document id in front is put back by whoever scores
        num_characters = len(tokenizer.decode(token_ids.tolist()))
        yield TokenDocument(token_ids, int(token_bytes[token_ids].sum()), num_characters)
