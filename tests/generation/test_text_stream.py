"""Streaming text and stop strings: what arrives in pieces equals the whole, wherever the borders of tokens fall."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from graft.generation.text import StopFinder, TextStream, prompt_ids


class Chunks:
    """A tokenizer whose ids stand for given byte strings."""

    end_of_document = 0

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = pieces

    def encode(self, text: str) -> list[int]:
        raise AssertionError("decoding only")

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def streamed(pieces: Sequence[bytes]) -> list[str]:
    stream = TextStream(Chunks(pieces))
    return [*(stream.push(i) for i in range(len(pieces))), stream.finish()]


@given(st.lists(st.binary(max_size=5), max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_stream_to_the_text_of_the_whole(pieces: list[bytes]) -> None:
    assert "".join(streamed(pieces)) == b"".join(pieces).decode("utf-8", errors="replace")


@given(st.text(min_size=1, max_size=200), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_real_text_never_shows_half_a_character(text: str, size: int) -> None:
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    so_far = ""
    for piece in streamed(pieces):
        so_far += piece
        assert text.startswith(so_far)
    assert so_far == text


def test_text_arrives_as_soon_as_it_is_complete() -> None:
    assert streamed([b"a", b"\xe2", b"\x82", b"\xacb", b"c"]) == ["a", "", "", "€b", "c", ""]


def test_broken_bytes_appear_at_the_end() -> None:
    assert "".join(streamed([b"a", b"\xe2\x82"])) == "a\ufffd"
    assert streamed([b"a", b"\xe2\x82"])[-1] == "\ufffd"


def test_the_cost_of_a_step_is_bounded() -> None:
    longest = 0

    class Measured(Chunks):
        def decode(self, ids: Sequence[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    stream = TextStream(Measured([b"xy"]))
    assert "".join(stream.push(0) for _ in range(1000)) == "xy" * 1000
    assert longest < 100


def found_by(finder: StopFinder, pieces: Sequence[str]) -> tuple[str, bool]:
    text = "".join(finder.push(piece) for piece in pieces)
    return text + finder.finish(), finder.stopped


def first_end(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The definition: read character by character, stop when any stop string has just ended (the longest wins)."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    st.text(alphabet="ab\n", max_size=40),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=60),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_wherever_tokens_end(text: str, stop: list[str], sizes: list[int]) -> None:
    pieces: list[str] = []
    rest = text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert found_by(StopFinder(stop), [*pieces, rest]) == first_end(text, stop)


def test_only_a_possible_start_of_a_stop_string_is_held_back() -> None:
    finder = StopFinder(["END"])
    assert [finder.push(t) for t in ("a", "bE", "N", "x", "END", "more")] == ["a", "b", "", "ENx", "", ""]
    assert finder.stopped


def test_a_prompt_starts_a_document() -> None:
    class Letters(Chunks):
        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text]

    assert prompt_ids(Letters([]), "") == [0]
    assert prompt_ids(Letters([]), "ab") == [0, 97, 98]
