"""JSON of others: one error that says what is wrong, where Python has several or none."""

from __future__ import annotations

import json

import pytest

from monkey_model.files import (
    WriteError,
    json_lines,
    list_problems,
    parse_json,
    read_json,
    writing,
)

BAD = {
    "[" * 100_000: "lists and objects are nested too deeply",
    '{"a":' * 100_000: "lists and objects are nested too deeply",
    f"[{'9' * 5000}]": "an integer has 5000 digits, too many to be read",
    '[{"a": 1, "b": 2, "a": 1}]': "an object has the key 'a' twice",
    "{": "Expecting property name",
    "": "Expecting value",
    b'"\xff"': "'utf-8' codec can't decode byte 0xff in position 1",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:10]))
def test_what_is_wrong_is_a_value_error(text, tmp_path):
    with pytest.raises(ValueError, match=BAD[text]):
        parse_json(text)
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{path} must be JSON: {BAD[text]}"):
        read_json(path)


def test_each_bad_line_is_one_alone():
    lines = ["1", *(text for text in BAD if text and isinstance(text, str)), "", '{"a": "\u2028"}']
    found = dict(json_lines("\n".join(lines)))
    assert found.pop(1) == 1 and found.pop(8) == {"a": "\u2028"}
    assert found.keys() == {2, 3, 4, 5, 6}
    for number, error in found.items():
        assert isinstance(error, ValueError) and BAD[lines[number - 1]] in str(error)
    first, bad, last = json_lines(b'\xef\xbb\xbf"\xc3\xa9"\r\n"\xff"\n2')
    assert (first, last) == ((1, "é"), (3, 2)) and isinstance(bad[1], UnicodeDecodeError)


def test_what_others_read_is_read_the_same(tmp_path):
    value = {"a": [1, -2.5, 10**4000, None, "é\ud800"], "b": {"a": {}}}
    assert parse_json(json.dumps(value)) == value
    path = tmp_path / "x.json"
    path.write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1}
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object; got list"):
        read_json(path)


def test_problems_are_cut_to_a_number():
    problems = ["a", "b", "c"]
    assert list_problems(problems, 3) == "a; b; c"
    assert list_problems(problems, 2) == "a; b; and 1 more"
    assert list_problems(problems, 1, "\n  ") == "a\n  and 2 more"


def test_only_what_a_disk_does_is_a_write_error(tmp_path):
    full = RuntimeError("[enforce fail at inline_container.cc:860] . PytorchStreamWriter failed")
    for error in (OSError("no space"), full):
        with pytest.raises(WriteError, match="x cannot be written: "), writing(tmp_path / "x"):
            raise error
    with pytest.raises(RuntimeError, match=r"^out of memory$"), writing(tmp_path / "x"):
        raise RuntimeError("out of memory")
