import math
from collections import Counter

import pytest

from graft.errors import DataError
from graft.evals.ngram import ngram_bits_per_byte


def plain(train: list[bytes], held_out: list[bytes], order: int) -> float:
    """The formula, one byte at a time with dictionaries."""
    grams: list[Counter[bytes]] = [Counter() for _ in range(order + 1)]
    for document in train:
        for n in range(1, order + 1):
            for i in range(len(document) - n + 1):
                grams[n][document[i : i + n]] += 1

    def probability(context: bytes, byte: bytes) -> float:
        n = len(context) + 1
        lower = probability(context[1:], byte) if n > 1 else 1 / 256
        followers = {g: c for g, c in grams[n].items() if g[:-1] == context}
        total, distinct = sum(followers.values()), len(followers)
        return (grams[n][context + byte] + distinct * lower) / (total + distinct) if total else lower

    bits = 0.0
    for document in held_out:
        for i in range(len(document)):
            context = document[max(0, i - order + 1) : i]
            bits -= math.log2(probability(context, document[i : i + 1]))
    return bits / sum(map(len, held_out))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_formula_byte_by_byte(order: int) -> None:
    train = [b"the cat sat on the mat. the rat sat on the cat.", b"a cat is not a rat", "naïve café".encode()]
    held_out = [b"the rat sat on a mat", "a naïve cat".encode(), b"z"]
    assert ngram_bits_per_byte(train, held_out, order) == pytest.approx(plain(train, held_out, order), rel=1e-12)


def test_unigram_of_one_symbol_is_its_closed_form() -> None:
    # 9 of 9 bytes are 'a': P = (9 + 1/256) / 10
    assert ngram_bits_per_byte([b"a" * 9], [b"aaa"], 1) == pytest.approx(-math.log2((9 + 1 / 256) / 10))


def test_probabilities_sum_to_one() -> None:
    train = [b"abracadabra", b"abc"]
    total = 0.0
    for byte in range(256):
        with_context = ngram_bits_per_byte(train, [b"ab" + bytes([byte])], 3) * 3
        context_alone = ngram_bits_per_byte(train, [b"ab"], 3) * 2
        total += 2 ** -(with_context - context_alone)
    assert total == pytest.approx(1.0)


def test_context_helps_on_structured_text() -> None:
    train, held_out = [b"abcdefgh" * 50], [b"abcdefgh" * 5]
    assert ngram_bits_per_byte(train, held_out, 5) < 0.5 * ngram_bits_per_byte(train, held_out, 1)


@pytest.mark.parametrize(("train", "held_out"), [([], [b"a"]), ([b"a"], []), ([b""], [b"a"])])
def test_empty_text_is_a_data_error(train: list[bytes], held_out: list[bytes]) -> None:
    with pytest.raises(DataError, match="needs text"):
        ngram_bits_per_byte(train, held_out, 2)
