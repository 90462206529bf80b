"""Which pictures a command is given, and what each is called."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from monkey_model.inputs import picture_lists
from monkey_model.inputs.images import load_image
from monkey_model.inputs.picture_lists import Picture, list_manifests, list_pictures
from tests.helpers.pictures import encoded

COLOURS = ("red", "green", "blue")


def png(colour: str) -> bytes:
    return encoded(Image.new("RGB", (4, 3), colour))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """red.png, sub/green.JPG, sub/deep/blue.png, and what is no picture."""
    monkeypatch.chdir(tmp_path)
    for name in ("in/red.png", "in/sub/green.JPG", "in/sub/deep/blue.png", "in/.hidden/x.png",
                 "in/.x.png", "in/notes.txt"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(png("red"))
    return tmp_path


def ids(pictures: list[Picture]) -> list[str]:
    return [picture.id for picture in pictures]


def test_files_and_addresses_are_what_they_are(folder):
    given = ["in/red.png", "missing.jpg", "https://example.com/a.png"]
    pictures = list_pictures(given)
    assert ids(pictures) == [picture.source for picture in pictures] == given
    assert [picture.name for picture in pictures] == ["red.png", "missing.jpg", "a.png"]


def test_folders_are_taken_when_asked(folder):
    pictures = list_pictures(["in"], recursive=True)
    assert ids(pictures) == ["in/red.png", "in/sub/green.JPG", "in/sub/deep/blue.png"]
    assert [p.name for p in pictures] == ["red.png", "sub/green.JPG", "sub/deep/blue.png"]
    with pytest.raises(ValueError, match="in is a folder; take the pictures in it by --recursive"):
        list_pictures(["in"])
    os.mkdir("empty")
    with pytest.raises(ValueError, match="empty holds no picture"):
        list_pictures(["empty"], recursive=True)


def test_patterns(folder):
    assert ids(list_pictures(["in/**/*.png"])) == ["in/red.png", "in/sub/deep/blue.png"]
    with pytest.raises(ValueError, match=r"\*\.gif matches no file"):
        list_pictures(["*.gif"])
    Path("[x].png").write_bytes(png("red"))  # a file of that name comes first
    assert ids(list_pictures(["[x].png"])) == ["[x].png"]


def test_a_list_on_standard_input(folder):
    lines = [b"in/red.png\n", b"\n", b"caf\xe9.png\r\n", b"last.png"]
    assert ids(list_pictures(["-"], lines=lines)) == ["in/red.png", "caf\udce9.png", "last.png"]
    with pytest.raises(ValueError, match="must be given once"):
        list_pictures(["-", "-"], lines=lines)


def test_two_ids_alike_are_refused(folder):
    with pytest.raises(ValueError, match=r"an id of its own; got 'in/red\.png' twice"):
        list_pictures(["in/red.png", "in/*.png"])


def write_tar(path: str, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            if isinstance(data, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                tar.addfile(data)
    return path


def test_a_tar_is_read_where_its_pictures_lie(folder):
    members = {f"part/{colour}.png": png(colour) for colour in COLOURS}
    tar = write_tar("a.tar", {**members, "part/red.json": b"{}", "part/red.txt": b"a red one"})
    pictures = list_pictures([tar])
    assert ids(pictures) == ["part/red", "part/green", "part/blue"]
    for picture, colour in zip(pictures, COLOURS, strict=True):
        expected = load_image(Image.new("RGB", (4, 3), colour))
        assert load_image(picture.read()).equal(expected)
    with open(tar, "r+b") as file:
        file.truncate(600)
    with pytest.raises(ValueError, match="ends inside a member"):
        pictures[-1].read()


def link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "mode", "message"),
    [
        ({"../x.png": b""}, "w", r"must hold paths inside it; got '\.\./x\.png'"),
        ({"/x.png": b""}, "w", "must hold paths inside it; got '/x.png'"),
        ({"x.png": link("x.png")}, "w", "must hold plain files; 'x.png' is none"),
        ({"x.png": b""}, "w:gz", "must be an uncompressed tar"),
        ({"x.txt": b""}, "w", "holds no picture"),
        ({"x.png": b"", "x.left.png": b"", "x.jpg": b""}, "w", "got 'x' twice"),
    ],
)
def test_tars_that_are_refused(folder, members, mode, message):
    write_tar("b.tar", members, mode)
    with pytest.raises(ValueError, match=message):
        list_pictures(["b.tar"])


def test_jsonl(folder):
    manifest = folder / "in" / "list.jsonl"
    rows = [{"image": "sub/green.JPG", "key": 7}, {"image": "../x.png", "key": "b"}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(folder / "in" / "sub/green.JPG"), str(folder / "in" / "../x.png")]
    pictures = list_manifests([manifest])
    assert ids(pictures) == paths
    assert [picture.name for picture in pictures] == ["sub/green.JPG", "x.png"]
    pictures = list_manifests([manifest], id_column="key")
    assert ids(pictures) == ["7", "b"] and [p.source for p in pictures] == paths


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"path": "a.png"}', {}, r"line 1 must have 'image'; got \['path'\]"),
        ('{"image": "a.png"}', {"id_column": "key"}, "line 1 must have 'key'"),
        ('{"image": "a.png"}\n[]', {}, "line 2 must be a JSON object"),
        ('{"image": ""}', {}, "must have a path in 'image'"),
        ('{"image": "a.png", "key": 0.5}', {"id_column": "key"}, "a string or an integer as id"),
        ('{"image": "a.png"}\n{"image": "a.png"}', {}, "an id of its own"),
    ],
)
def test_jsonl_that_is_refused(tmp_path, text, options, message):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        list_manifests([tmp_path / "list.jsonl"], **options)


def write_parquet(path: Path, groups: int = 2, **columns) -> Path:
    table = pa.table(columns)
    pq.write_table(table, path, row_group_size=-(-len(table) // groups))
    return path


def test_parquet_of_bytes_is_read_row_group_by_row_group(tmp_path):
    data = [png(colour) for colour in COLOURS]
    nested = [{"bytes": data[0], "path": None}, {"bytes": None, "path": "x.png"}, None]
    (tmp_path / "x.png").write_bytes(data[1])
    file = write_parquet(tmp_path / "a.parquet", image=data, nested=nested, key=[1, 2, 3])
    pictures = list_manifests([file])
    assert ids(pictures) == ["a.parquet:0", "a.parquet:1", "a.parquet:2"]
    assert [picture.read() for picture in pictures] == data
    pictures = list_manifests([file], column="nested", id_column="key")
    assert ids(pictures) == ["1", "2", "3"]
    assert load_image(pictures[0].read()).equal(load_image(data[0]))
    assert load_image(pictures[1].read()).equal(load_image(data[1]))
    with pytest.raises(ValueError, match="has no picture in 'nested', row 0 of row group 1"):
        pictures[2].read()


def test_parquet_of_paths(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", image=["x/a.png", "https://example.com/b.png"])
    pictures = list_manifests([file])
    assert ids(pictures) == [str(tmp_path / "x/a.png"), "https://example.com/b.png"]


def test_parquet_that_is_refused(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", image=[b"x"], number=[1.5], empty=[None])
    for options, message in (
        (
            {"column": "picture"},
            r"a column 'picture'; got \['image', 'number', 'empty'\]",
        ),
        ({"id_column": "key"}, "must have a column 'key'"),
        ({"column": "number"}, "must have paths or bytes in 'number'; got double"),
        ({"id_column": "number"}, "must have a string or an integer as id; got 1.5"),
        ({"id_column": "empty"}, "row 0 must have an id in 'empty'; got none"),
    ):
        with pytest.raises(ValueError, match=message):
            list_manifests([file], **options)
    monkeypatch.setattr(picture_lists, "MAX_ROW_GROUP_BYTES", 1)
    with pytest.raises(
        ValueError, match="row groups of at most MAX_ROW_GROUP_BYTES = 1 in 'image'"
    ):
        list_manifests([file])
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.parquet must be Parquet"):
        list_manifests([tmp_path / "b.parquet"])
    with pytest.raises(ValueError, match=r"must be a \.jsonl or \.parquet file"):
        list_manifests([tmp_path / "list.csv"])


def test_a_missing_extra_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    message = r'Parquet needs pyarrow: pip install "monkey-vision\[parquet\]"'
    with pytest.raises(ImportError, match=message):
        list_manifests([tmp_path / "a.parquet"])
