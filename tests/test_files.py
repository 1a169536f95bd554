"""Files that are whole or as they were, text that is read as it stands, YAML that says what it seems to."""

import os

import pytest

from visalign import files
from visalign.files import is_full, parse_yaml, read_lines, read_yaml, write_beside, write_whole


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "before")

    def fail(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as caught:
        write_beside(path, fail)
    assert is_full(caught.value) and not is_full(OSError(2, "No such file"))
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.json"]
    write_whole(path, b"after")
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["a.json"]


def test_the_file_is_never_half_there(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    write_whole(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    inside = "a\u2028b\u0085c\x0bd\x0ce\x1cf"
    path.write_bytes(f"\ufeff{inside}\r\nsecond\nthird\r\n".encode())
    assert read_lines(path) == [inside, "second", "third"]
    path.write_bytes(b"one\n\ntwo")
    assert read_lines(path) == ["one", "", "two"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 010", 10),
        ("a: 1:30", "1:30"),
        ("a: yes", "yes"),
        ("a: No", "No"),
        ("a: 2026-12-01", "2026-12-01"),
        ("a: 0x1F", 31),
        ("a: 0o17", 15),
        ("a: 3e-4", 3e-4),
        ("a: 1.", 1.0),
        ("a: -.5", -0.5),
        ("a: true", True),
        ("a: ~", None),
        ("a:", None),
        ("a: [1, '2', .inf]", [1, "2", float("inf")]),
        ("a: {b: 1, c: {b: 2}}", {"b": 1, "c": {"b": 2}}),
        ("a: '010'", "010"),
    ],
)
def test_yaml_says_what_it_seems_to(text, value):
    assert parse_yaml(text, "x") == {"a": value} and type(parse_yaml(text, "x")["a"]) is type(value)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{n}: &{n} [{','.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' stands twice"),
        ("a: {b: 1, b: 1}", "the key 'b' stands twice"),
        ("[" * 3000 + "]" * 3000, "nested too deep"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "nested too deep"),
        ("a: [1", "is not YAML"),
        (BOMB, "anchors repeat it to more than 100,000 values"),
        ("a: &a [*a]", "anchors repeat it|holds itself"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_yaml_that_says_something_twice_or_without_end_is_one_line(text, says):
    with pytest.raises(ValueError, match=f"^x: .*({says})") as caught:
        parse_yaml(text, "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_yaml_file_that_cannot_be_read_names_the_argument(tmp_path):
    with pytest.raises(ValueError, match="^config: got .*none.yaml', which cannot be read"):
        read_yaml(tmp_path / "none.yaml", "config")
    (tmp_path / "b.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match="^config: got .*b.yaml', which is not UTF-8 text"):
        read_yaml(tmp_path / "b.yaml", "config")
    (tmp_path / "c.yaml").write_bytes("\ufeffa: 1".encode())
    assert read_yaml(tmp_path / "c.yaml", "config") == {"a": 1}
