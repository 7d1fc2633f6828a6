"""How fast is text encoded, against the tokenizers library on the same vocabulary? The ids must be identical."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import numpy as np

from benchmarks.timing import comparison, interleaved, record
from graft.data.tokenizers.bpe import BpeTokenizer
from graft.data.tokenizers.bpe_config import BpeTokenizerConfig

TRAINED_ON = 4_000_000
ENCODED = 12_000_000


def library_sources(most: int) -> list[str]:
    """Source files of the running Python's standard library, in order, up to ``most`` characters."""
    texts: list[str] = []
    total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        texts.append(text)
        total += len(text)
        if total >= most:
            break
    return texts


def run(args: argparse.Namespace) -> None:
    texts = library_sources(ENCODED)
    tokenizer = BpeTokenizer(BpeTokenizerConfig(vocab_size=8192))
    tokenizer.train(texts[:: max(1, ENCODED // TRAINED_ON)])
    assert tokenizer.fast is not None, "tiktoken is not installed"
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    peer = [np.asarray(e.ids) for e in tokenizer.plain.encode_batch(texts, add_special_tokens=False)]
    same = sum(np.array_equal(a, b) for a, b in zip(tokenizer.encode_batch(texts), peer, strict=True))
    assert same == len(texts), f"only {same} of {len(texts)} files have the same ids"
    timed = interleaved(
        {
            "graft encode_batch": lambda: tokenizer.encode_batch(texts),
            "tokenizers encode_batch": lambda: tokenizer.plain.encode_batch(texts, add_special_tokens=False),
            "tokenizers encode_batch_fast": lambda: tokenizer.plain.encode_batch_fast(texts, add_special_tokens=False),
        },
        rounds=args.rounds,
    )
    rates = ", ".join(f"{name} {megabytes / t.median:.1f} MB/s" for name, t in timed.items())
    record(
        "Encoding text",
        f"{megabytes:.1f} MB of Python source, byte-level BPE with 8192 ids, identical ids in {same} of {len(texts)} "
        f"files.\n\n{comparison(timed, 'graft encode_batch')}\n\n{rates}.",
    )
