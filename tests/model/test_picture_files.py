"""Files that are hostile, damaged or no pictures at all: what is refused, before it costs anything.

The hostile ones are built here, byte by byte; each is small, and each limit is tried on both sides.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from monkey_model.inputs import images, picture_files
from monkey_model.inputs.images import load_image
from tests.helpers.pictures import RGB, assert_pixels, encoded, exif, stacked

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^source of .* is not a readable image: {message}"):
        load_image(data)


# --- formats ---------------------------------------------------------------------------------


def iptc(payload: bytes) -> bytes:
    """A grey IPTC picture of 9x9 pixels, whose data are a file of any other format."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(data)) + data

    header = {60: b"\1\0", 20: b"\0\0\0\x09", 30: b"\0\0\0\x09", 120: b"\0\0\0\5"}
    fields = b"".join(field(3, number, data) for number, data in header.items())
    return fields + field(8, 10, payload) + bytes(5)


@pytest.fixture
def ghostscript_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a Ghostscript of our own makes when it is run."""
    mark = tmp_path / "ghostscript ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers what it found
    return mark


@pytest.mark.parametrize("name", ["picture.jpg", "picture.iim"])
def test_no_picture_runs_ghostscript(name: str, tmp_path: Path, ghostscript_ran: Path) -> None:
    path = tmp_path / name
    with pytest.raises(OSError):  # ours draws nothing
        Image.open(io.BytesIO(EPS)).load()
    assert ghostscript_ran.exists()
    ghostscript_ran.unlink()

    for data in (EPS, iptc(EPS)):
        format = Image.open(io.BytesIO(data)).format
        for source in (data, Image.open(io.BytesIO(data))):
            with pytest.raises(ValueError, match=f"{format}.* is not one of JPEG, PNG, WEBP, "):
                load_image(source)
        path.write_bytes(data)
        message = f"{name}' is not a readable image: it looks like {format}, which is not one of"
        with pytest.raises(ValueError, match=message):
            load_image(path)
    assert not ghostscript_ran.exists()


@pytest.mark.parametrize("format", ["SGI", "PCX", "JPEG2000", "ICNS", "MSP", "DDS"])
def test_formats_that_are_not_decoded(format: str) -> None:
    image = Image.fromarray(RGB).convert("1" if format == "MSP" else "RGB")
    data = encoded(image, format)
    refused(data, f"it looks like {format}, which is not one of JPEG, PNG, WEBP, GIF, BMP, TIFF")
    opened = Image.open(io.BytesIO(data))
    message = f"{format} is not one of .*; if you trust it, pass image.copy\\(\\)"
    with pytest.raises(ValueError, match=message):
        load_image(opened)
    assert load_image(opened.copy()).shape == (*opened.size[::-1], 3)


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (b"%PDF-1.7\n", "PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG or XML"),
        (b"\xd7\xcd\xc6\x9a\0\0" + bytes(40), "WMF"),
        (b"8BPS\0\1" + bytes(40), "PSD"),
        (b"BUFR" + bytes(40), "BUFR"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (b"SIMPLE  =                    T", "FITS"),
        (b"qoif" + bytes(40), "QOI"),
    ],
)
def test_other_files_are_recognised_by_their_first_bytes(data: bytes, format: str) -> None:
    refused(data, f"it looks like {format}, which is not one of JPEG")


@pytest.mark.parametrize("format", [*picture_files._formats(), "MPO"])
def test_formats_that_are_decoded(format: str) -> None:
    lossless = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(7, 5)]}}.get(format, {})
    pixels = load_image(encoded(Image.fromarray(RGB), format, **lossless))
    if format in ("JPEG", "MPO", "AVIF"):
        assert pixels.shape == (5, 7, 3)
    else:
        assert_pixels(pixels, RGB)


@pytest.mark.parametrize("data", [b"", b"\xff", b"not an image", b"<html></html>"])
def test_no_image(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_bytes(data)
    message = f"source {str(path)!r} is not a readable image: it is damaged, or not one of JPEG"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_image(path)
    refused(data, "it is damaged, or not one of JPEG")


# --- where a file is -------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.jpg"
    with pytest.raises(FileNotFoundError, match="source cannot be opened: No such file") as caught:
        load_image(path)
    assert caught.value.filename == str(path)
    assert str(path) in str(caught.value)


def test_directory(tmp_path: Path) -> None:
    message = f"source cannot be opened: Is a directory: {str(tmp_path)!r}"
    with pytest.raises(IsADirectoryError, match=re.escape(message)):
        load_image(str(tmp_path))


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    """A pipe without a writer would wait for ever, /dev/zero never end."""
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    link = tmp_path / "link.jpg"
    link.symlink_to("/dev/zero")
    for path in (pipe, link, "/dev/zero", "/dev/null"):
        assert not stat.S_ISREG(os.stat(path).st_mode)
        with pytest.raises(ValueError, match=f"source '{path}' must be a regular file"):
            load_image(path)


def test_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    with pytest.raises(OSError, match="source cannot be opened: Too many levels of symbolic"):
        load_image(tmp_path / "a.jpg")


def test_enormous_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse.webp"
    with open(path, "wb") as file:
        file.write(encoded(Image.fromarray(RGB), "WEBP"))
        file.truncate(picture_files.MAX_FILE_BYTES + 1)
    message = f"must have at most MAX_FILE_BYTES = {2**30}; got {2**30 + 1}"
    with pytest.raises(ValueError, match=message):
        load_image(path)


# --- pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [34, 18, 17, 10])  # Pillow warns up to twice the limit
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_decompression_bomb(
    limit: int, action: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.png"
    Image.fromarray(RGB).save(path)  # 35 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match=r"bomb\.png' is not a readable image: .*35.* pixels"):
            load_image(path)
    with pytest.raises(ValueError, match=f"5x7 = 35 pixels exceed .*MAX_IMAGE_PIXELS = {limit}"):
        load_image(Image.fromarray(RGB))


@pytest.mark.parametrize("limit", [35, None])  # None: the caller's own decision
def test_decompression_limit_is_pillow_s(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert_pixels(load_image(encoded(Image.fromarray(RGB))), RGB)


def test_the_size_after_loading_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swelling(Image.Image):
        size = property(lambda self: (100, 100) if self.loaded else (1, 1))
        height = width = property(lambda self: self.size[0])
        loaded = False

        def load(self) -> None:
            self.loaded = True

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9999)
    monkeypatch.setattr(images, "open_picture", lambda _: Swelling())
    refused(b"", "100x100 = 10000 pixels exceed PIL.Image.MAX_IMAGE_PIXELS = 9999")


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_pillow_image_of_zero_size(size: tuple[int, int]) -> None:
    message = "source Pillow image of mode RGB is not a readable image: it has no pixels, but"
    with pytest.raises(ValueError, match=message):
        load_image(Image.new("RGB", size))


def test_out_of_memory_is_not_called_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_copy_pixels", exhausted)
    with pytest.raises(MemoryError):
        load_image(Image.fromarray(RGB))


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", picture_files._formats())
def test_truncated_file(format: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), format)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    for fast_decode in (None, (8, 8)):
        with pytest.raises(ValueError, match=f"source {re.escape(repr(str(path)))} is not a"):
            load_image(path, fast_decode=fast_decode)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
@pytest.mark.parametrize("format", picture_files._formats())
def test_damaged_files_raise_only_value_error(format: str) -> None:
    generator = np.random.default_rng(5)
    pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = np.frombuffer(encoded(Image.fromarray(pixels), format), np.uint8)
    for _ in range(40):
        damaged = data.copy()
        damaged[generator.integers(0, min(len(data), 300), 8)] ^= 0xFF
        try:
            result = load_image(damaged.tobytes())
        except ValueError as error:
            assert str(error).startswith("source of ")
        else:  # the damage hit pixels or metadata only
            assert result.shape[2] == 3


# --- JPEG ------------------------------------------------------------------------------------


def jpeg(scans: int, segments: bytes = b"", size: int = 8) -> bytes:
    """A progressive JPEG, grey, of ``scans`` scans, all but the first empty."""

    def segment(marker: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data

    tables = [
        segment(0xDB, b"\0" + bytes([1] * 64)),
        segment(0xC2, struct.pack(">BHHB", 8, size, size, 1) + b"\1\x11\0"),
        segment(0xC4, b"\x10" + bytes([1, *[0] * 15]) + b"\0"),
        segment(0xC4, b"\x00" + bytes([1, *[0] * 15]) + b"\0"),
    ]
    flat = segment(0xDA, b"\1\1\0\0\0\0") + b"\0"
    empty = segment(0xDA, b"\1\1\0\1\x3f\0") + b"\0"
    return b"\xff\xd8" + segments + b"".join(tables) + flat + empty * (scans - 1) + b"\xff\xd9"


def test_scans_of_a_jpeg_are_counted() -> None:
    """20,000 scans, 0.38 MB, took 47 seconds."""
    most = picture_files.MAX_SCANS
    assert load_image(jpeg(most)).shape == (8, 8, 3)
    message = f"a JPEG may have at most MAX_SCANS = {most} scans"
    refused(jpeg(most + 1), message)
    with pytest.raises(ValueError, match=message):
        load_image(Image.open(io.BytesIO(jpeg(20_000))))


def test_scans_are_those_that_the_decoder_sees() -> None:
    many = jpeg(picture_files.MAX_SCANS + 1)
    # Behind the picture's end: the other pictures of an MPO, the film of a "motion photo".
    assert load_image(jpeg(1) + many).shape == (8, 8, 3)
    # In a segment, as a thumbnail is, but not if that segment only seems to hold them.
    thumbnail = struct.pack(">BBH", 0xFF, 0xE5, 2 + len(many)) + many
    assert load_image(jpeg(1, thumbnail)).shape == (8, 8, 3)
    refused(many.replace(b"\xff\xda", b"\xff\xff\xff\xda"), "a JPEG may have at most MAX_SCANS")
    reserved = many.replace(b"\0\xff\xda", b"\0\xff\x02\xff\xff\xd1\xff\xda")
    refused(reserved, "a JPEG may have at most MAX_SCANS")


@pytest.mark.parametrize("quality", [30, 100])
def test_scans_across_the_blocks_that_are_read(
    quality: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(6).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), "JPEG", progressive=True, quality=quality)
    found = []
    for block in (1, 2, 3, 2**16):
        monkeypatch.setattr(picture_files, "_BLOCK", block)
        found.append([marker for marker, *_ in picture_files._segments(io.BytesIO(data))])
    assert found[0].count(0xDA) > 5
    assert all(markers == found[0] for markers in found)


def test_segments_of_a_jpeg_are_counted() -> None:
    most = picture_files.MAX_SEGMENTS - 5  # the picture's own
    empty = b"\xff\xe5\0\2"
    assert load_image(jpeg(1, empty * most)).shape == (8, 8, 3)
    refused(jpeg(1, empty * (most + 1)), "a JPEG may have at most MAX_SEGMENTS = 2000 segments")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_data_are_limited(format: str) -> None:
    """Pillow joins the segments of a JPEG, copying what it has at each."""
    image = Image.fromarray(RGB)
    if format == "JPEG":
        part = b"\xff\xe1" + struct.pack(">H", 2**16 - 1) + b"Exif\0\0" + bytes(2**16 - 9)
        accepted, over = (jpeg(1, part * count) for count in (4, 5))
    else:
        accepted, over = (
            encoded(image, format, exif=exif(3).tobytes() + bytes(count))
            for count in (2**18 - 100, 2**18)
        )
    assert load_image(accepted).shape[2] == 3
    message = "its EXIF data exceed MAX_EXIF_BYTES = 262144"
    refused(over, message)
    if format == "JPEG":  # before Pillow joins them
        with pytest.raises(ValueError, match=message):
            picture_files._check_jpeg(io.BytesIO(over))


# --- PNG -------------------------------------------------------------------------------------


def png(*before: tuple[bytes, bytes], after: list[tuple[bytes, bytes]] | None = None) -> bytes:
    """One black pixel between other chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    chunks = [header, *before, (b"IDAT", zlib.compress(bytes(4))), *(after or []), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + data


PROFILE = (b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20 - 1)))


def test_one_profile_in_a_png() -> None:
    """Each unpacks from 1 KB to 1 MiB: 2 MB took 4.6 seconds."""
    assert load_image(png(PROFILE)).shape == (1, 1, 3)
    message = "a PNG may have at most 1 iCCP chunk"
    refused(png(PROFILE, PROFILE), message)
    refused(png(PROFILE, after=[PROFILE]), message)


def test_chunks_of_a_png_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gamma = (b"gAMA", struct.pack(">I", 45455))
    most = picture_files.MAX_OTHER_CHUNKS - 1  # the header
    assert load_image(png(*[gamma] * most)).shape == (1, 1, 3)
    for data in (png(*[gamma] * (most + 1)), png(gamma, after=[gamma] * most)):
        refused(data, "a PNG may have at most MAX_OTHER_CHUNKS = 1000 chunks that hold no pixels")
    most = picture_files.MAX_IMAGE_CHUNKS
    refused(png(after=[(b"IDAT", b"")] * most), f"a PNG may have at most {most} chunks of pixels")


def test_texts_of_a_png_are_limited_by_pillow() -> None:
    bomb = (b"zTXt", b"x\0\0" + zlib.compress(bytes(2**20 + 1)))
    refused(png(bomb), "Decompressed [Dd]ata [Tt]oo [Ll]arge")
    texts = [(b"zTXt", b"%d\0\0" % n + zlib.compress(bytes(2**20 - 1))) for n in range(65)]
    refused(png(*texts), "Too much memory used in text chunks")


# --- TIFF ------------------------------------------------------------------------------------


def tiff(changes: dict[int, tuple[int, int, int]], data: bytes = b"", big: bool = False) -> bytes:
    """One grey pixel; ``changes`` are tags to kind, count and value (or where the values are)."""
    end = 16 + 8 + 20 * 16 if big else 8 + 2 + 12 * 16
    tags = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: end, 277: 1, 278: 1, 279: 1}
    entries = {tag: (4, 1, value) for tag, value in tags.items()} | changes
    if big:
        head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(entries))
    else:
        head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    form = "<HHQQ" if big else "<HHII"
    body = b"".join(struct.pack(form, tag, *entries[tag]) for tag in sorted(entries))
    return (head + body).ljust(end, b"\0") + b"\x7f" + data


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(("tag", "kind"), [(273, 4), (273, 1), (258, 3), (40000, 12)])
def test_values_of_a_tiff_are_counted(tag: int, kind: int, big: bool) -> None:
    """Pillow makes a tile of each strip: 250 bytes of memory for 4 of the file."""
    assert_pixels(load_image(tiff({}, big=big)), np.full((1, 1, 3), 127))
    message = f"a tag of a TIFF may hold at most MAX_TAG_VALUES = 262144 numbers; tag {tag} holds"
    refused(tiff({tag: (kind, 2**18 + 1, 8)}, big=big), message)


def test_long_texts_of_a_tiff_are_not_numbers() -> None:
    data = tiff({270: (2, 2**19, 203), 700: (1, 2**19, 203)}, b"x" * 2**20)
    assert load_image(data).shape == (1, 1, 3)


@pytest.mark.parametrize("side", [322, 323])
def test_a_tile_is_no_larger_than_a_picture_may_be(side: int) -> None:
    """libtiff makes room for a whole tile: 143 bytes took 2 GB."""
    tile = {259: (4, 1, 5), 322: (4, 1, 16), 323: (4, 1, 16), 324: (4, 1, 202), 325: (4, 1, 1)}
    refused(tiff(tile | {side: (4, 1, 2**24)}), ".* pixels exceed PIL.Image.MAX_IMAGE_PIXELS")
    refused(tiff(tile | {side: (16, 1, 2**24)}), f"tag {side} of a TIFF must be one SHORT or LONG")


def test_big_endian_big_tiff() -> None:
    refused(b"MM\0\x2b\0\x08\0\0" + bytes(40), "a BigTIFF must be little-endian")


@pytest.mark.filterwarnings("ignore:Tag data larger than file")  # newer releases pass over them
def test_tags_of_a_tiff_that_overlap() -> None:
    """Each of 3000 tags is all of the file: 0.4 MB took 2.3 GB."""
    data = tiff({}, bytes(400_000))
    tags = {1000 + n: (7, 400_000, 8) for n in range(3000)}
    end = 8 + 2 + 12 * (9 + len(tags))
    data = tiff(tags | {273: (4, 1, end)}, bytes(400_000))
    sizes: list[int] = []

    class Counted(picture_files._Metered):
        def read(self, size: int = -1) -> bytes:
            sizes.append(len(data := super().read(size)))
            return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture_files, "_Metered", Counted)
        try:
            load_image(data)
        except ValueError as error:
            assert "parts of its header overlap" in str(error)
    assert sum(sizes) <= 4 * len(data) + 2**20 + 400_000


def test_bytes_that_are_read_again_and_again() -> None:
    file = picture_files._Metered(io.BytesIO(bytes(1000)))
    for _ in range(4 + 2**20 // 1000):
        file.seek(0)
        file.read()
    file.seek(0)
    with pytest.raises(
        ValueError, match="parts of its header overlap: they hold four times the file's bytes"
    ):
        file.read()


@pytest.mark.parametrize("order", [range(99, -1, -1), [0] * 100], ids=["backwards", "one"])
def test_short_strips_of_a_tiff(order: range | list[int]) -> None:
    """Pillow may read 64 KiB for each, and so most of this file a hundred times."""
    rows = np.random.default_rng(7).integers(0, 256, (100, 700), dtype=np.uint8)
    offsets = struct.pack("<100I", *(603 + 700 * row for row in order))
    sizes = {256: (4, 1, 700), 257: (4, 1, 100), 273: (4, 100, 203), 279: (4, 100, 203)}
    data = tiff(sizes, offsets + rows.tobytes())
    assert_pixels(load_image(data), stacked(rows[list(order)]))


# --- PPM, GIF, BMP ---------------------------------------------------------------------------


def test_long_comment_of_a_ppm() -> None:
    """Pillow reads it byte by byte: 30 MB took 9 seconds."""
    accepted, over = (b"P6\n#" + b"x" * count + b"\n1 1\n255\nabc" for count in (9900, 10_000))
    assert_pixels(load_image(accepted), np.array([[[97, 98, 99]]]))
    refused(over, "it is cut into too many parts: more than MAX_HEADER_READS = 10000 of metadata")


def test_long_comment_of_a_gif() -> None:
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"!\xfe"
    block = b"\xff" + b"x" * 255
    pixel = b"\0,\0\0\0\0\1\0\1\0\0\2\2\x44\1\0;"
    assert load_image(head + block * 4900 + pixel).shape == (1, 1, 3)
    refused(head + block * 5000 + pixel, "it is cut into too many parts")


@pytest.mark.parametrize("magic", [b"P1", b"P2", b"P3"])
def test_ppm_in_digits(magic: bytes) -> None:
    head = magic + b"\n1 1\n" + (b"" if magic == b"P1" else b"1\n")
    body = b"0 " * (3 if magic == b"P3" else 1)
    assert load_image(head + b"#\n" * 1000 + body).shape == (1, 1, 3)
    message = "a PPM in decimal digits may have at most "
    refused(head + b"#\n" * 1001 + body, message + "MAX_PLAIN_COMMENTS = 1000")
    refused(head + b" " * 2**24 + body, message + "MAX_PLAIN_BYTES = 16777216")


def test_reads_of_the_pixels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads a PPM of unusual depth pixel by pixel, a packed BMP run by run."""
    ppm = b"P5\n100 100\n254\n" + bytes(10_000)
    header = struct.pack("<IiiHHIIiiII", 40, 100, 100, 1, 8, 1, 0, 0, 0, 256, 0)
    bmp = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + header + bytes(1024)
    bmp += (b"\1\0" * 100 + b"\0\0") * 100  # a run for each pixel, and an end for each line
    for data, reads in ((ppm, 10_000), (bmp, 2 * 10_099)):
        monkeypatch.setattr(picture_files, "MAX_READS", reads)
        assert load_image(data).shape == (100, 100, 3)
        monkeypatch.setattr(picture_files, "MAX_READS", reads - 1)
        refused(data, f"it is cut into too many parts: .* or MAX_READS = {reads - 1} of pixels")


# --- ICO -------------------------------------------------------------------------------------


def ico(*pictures: bytes) -> bytes:
    """An icon whose directory says that every picture has 256x256 pixels."""
    at = 6 + 16 * len(pictures)
    entries = b""
    for picture in pictures:
        entries += struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(picture), at)
        at += len(picture)
    return struct.pack("<HHH", 0, 1, len(pictures)) + entries + b"".join(pictures)


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_pixels_of_a_picture_inside_an_icon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow decodes it while it opens the file, up to twice its limit."""
    data = ico(encoded(Image.fromarray(RGB)))
    assert_pixels(load_image(data), RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    refused(data, "5x7 = 35 pixels exceed PIL.Image.MAX_IMAGE_PIXELS = 34")
    bitmaps = [
        struct.pack("<IiiHHIIiiII", 40, 7, -10, 1, 32, 0, 0, 0, 0, 0, 0),
        struct.pack("<IHHHH", 12, 7, 10, 1, 24),
    ]
    for bitmap in bitmaps:
        refused(ico(bitmap.ljust(1000, b"\0")), "5x7 = 35 pixels exceed")


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_chunks_and_pictures_of_an_icon_are_counted() -> None:
    refused(ico(png(PROFILE, PROFILE)), "a PNG may have at most 1 iCCP chunk")
    refused(ico(png(after=[(b"IDAT", b"")] * 1000)), "a PNG may have at most 1000 chunks of pixels")
    picture = png()
    assert load_image(ico(*[picture] * 256)).shape == (1, 1, 3)
    refused(ico(*[picture] * 257), "an ICO may have at most MAX_ICONS = 256 pictures; got 257")


# --- AVIF ------------------------------------------------------------------------------------


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(data), kind) + data


AVIF = box(b"ftyp", b"avif\0\0\0\0avifmif1")


def test_lists_of_an_avif_are_limited() -> None:
    """libavif looks for each item among all others: 1.4 MB, 60,000 items, took 6 seconds."""
    items = b"".join(
        box(b"infe", struct.pack(">IIH4sB", 3 << 24, number, 0, b"av01", 0))
        for number in range(1, 10_000)
    )
    meta = box(b"meta", bytes(4) + box(b"iinf", struct.pack(">II", 1 << 24, 9_999) + items))
    message = "the lists of an AVIF may have at most MAX_BOX_BYTES = 131072"
    refused(AVIF + meta, message)
    refused(AVIF + box(b"free", bytes(9)) + meta, message)
    refused(AVIF + struct.pack(">I4sQ", 1, b"meta", 8 + len(meta)) + meta[8:], message)
    refused(AVIF + struct.pack(">I4s", 0, b"moov") + meta[8:], message)
    refused(AVIF + box(b"meta", bytes(2**16)) + box(b"moov", bytes(2**16)), message)
    refused(AVIF + box(b"free", b"") * 1000, "an AVIF may have at most MAX_BOXES = 1000 boxes")
