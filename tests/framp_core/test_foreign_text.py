from hypothesis import given
from hypothesis import strategies as st

from framp_core.foreign_text import listed, printable

ANY_TEXT = st.text(st.characters(exclude_categories=()))


def test_what_steers_a_terminal_is_shown() -> None:
    assert printable("a\x1b[2Jb\x07\x9b") == r"a\x1b[2Jb\x07\x9b"
    assert printable("one\r\ntwo\t\u202e\ud800") == r"one\r\ntwo\t\u202e\ud800"
    assert printable("one\n\ttwo\r", lines=True) == "one\n\ttwo\\r"
    assert printable(r"C:\data, Köln, 图") == r"C:\data, Köln, 图"


def test_long_text_keeps_its_beginning_or_its_end() -> None:
    head, tail = (printable("begin" + "x" * 5_000_000 + "end", 60, tail=tail) for tail in (False, True))
    assert head.startswith("beginxxx")
    assert head.endswith("x [cut, of 5,000,008 characters]")
    assert tail.startswith("[cut, of 5,000,008 characters] x")
    assert tail.endswith("xend")
    assert len(head) == len(tail) == 60


def test_other_types_are_named() -> None:
    values = (b"x" * 10**6, 3, None, ["a"])
    assert [printable(value) for value in values] == ["<bytes>", "<int>", "<NoneType>", "<list>"]


@given(ANY_TEXT, st.integers(60, 100), st.booleans(), st.booleans())
def test_the_result_is_short_printable_and_its_own_result(text: str, longest: int, lines: bool, tail: bool) -> None:
    shown = printable(text, longest, lines=lines, tail=tail)
    assert len(shown) <= longest
    assert all(char.isprintable() or (lines and char in "\n\t") for char in shown)
    assert printable(shown, longest, lines=lines, tail=tail) == shown
    assert shown == text or not text.isprintable() or len(text) > longest
    shown.encode("utf-8")


def test_of_many_names_the_first_stand_there_and_the_others_are_counted() -> None:
    assert listed([]) == "nothing"
    assert listed(dict.fromkeys("abcde")) == "'a', 'b', 'c', 'd', 'e'"
    assert listed(["x" * 41, "\x1b[2J", *"abcdef"]) == f"'{'x' * 40}', '\\x1b[2J', 'a', 'b', 'c' and 3 more"
