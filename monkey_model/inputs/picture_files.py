"""Picture files that may come from anyone: which formats are decoded, and how much one may ask for.

An honest file costs its decoder what its pixels and bytes cost. What a hostile one repeats at no
cost to itself is counted here, before Pillow sees the file or while it reads. Time is not measured:
it would depend on the machine. SECURITY.md lists the limits.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from typing import IO, TypeAlias, cast

from PIL import Image, ImageFile, UnidentifiedImageError

from monkey_model.files import sha256_of

# What Pillow decodes itself (MPO, a JPEG with more pictures behind it, comes with JPEG). Left out:
# what runs a program (EPS) or hands an inner file to Image.open (IPTC), or to a handler that some
# other package registered (WMF, BUFR, GRIB, HDF5); what is decoded pixel by pixel in Python (QOI)
# or unpacked without a bound (FITS, JPEG 2000: 6 GB for 150 bytes); and what nobody's photo is.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF")

MAX_FILE_BYTES = 2**30  # the largest decodable picture, 89 million pixels of 8 bytes, has 0.7 GiB
# Reads that Pillow makes for what comes before the pixels. A header of a few parts takes some tens,
# two per block of a GIF's metadata and one per byte of a PPM's comment.
MAX_HEADER_READS = 10_000
# For the pixels. One per pixel of a PPM of unusual depth, two per run of a BMP: 4 seconds or so.
MAX_READS = 2**22
MAX_SCANS = 100  # of a JPEG: encoders write about 10, and libtiff stops at 100 too
MAX_SEGMENTS = 2_000  # of a JPEG, each up to 64 KiB: tables, profiles, metadata
MAX_EXIF_BYTES = 2**18  # four full segments of a JPEG; its directory may name each byte many times
MAX_IMAGE_CHUNKS = 100_000  # of a PNG: 800 MB in the usual 8 KiB
MAX_OTHER_CHUNKS = 1_000  # of a PNG: text, colours, dates
MAX_TAG_VALUES = 2**18  # numbers in a tag of a TIFF: its strips, say, or three curves of 16 bits
MAX_ICONS = 256  # in an ICO
MAX_BOXES = 1_000  # of an AVIF, on the outside: an honest one has three or four
MAX_BOX_BYTES = 2**17  # its lists of items and frames, which libavif goes through for each of them
MAX_PLAIN_BYTES = 2**24  # of a PPM in decimal digits, which Python parses: 3 seconds or so
MAX_PLAIN_COMMENTS = 1_000  # in one, each moves up to 1 MiB

_BLOCK = 2**16
# Tags of which Pillow makes a list: bits per sample, strips, colours, tiles, extra samples, format.
_TIFF_LISTS = (258, 273, 279, 320, 324, 325, 338, 339)
_TIFF_BYTES = (1, 2, 7)  # kinds of values that stay bytes: BYTE, ASCII, UNDEFINED
_PNG = b"\x89PNG\r\n\x1a\n"
# A marker of a JPEG that may begin a segment: not a stuffed zero, a fill byte, TEM or a restart.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
# What people have that Pillow's own table of signatures does not tell.
_SIGNATURES = (
    (re.compile(rb"\x1c[\x01-\x09\xf0]"), "IPTC"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL), "HEIF"),
    (re.compile(rb"\s*<(?:svg|\?xml)"), "SVG or XML"),
)


@contextlib.contextmanager
def open_file(path: str) -> Iterator[IO[bytes]]:
    """A regular file, opened for reading.

    Raises:
        ValueError: it is a pipe, a socket or a device, which may never end, or a file of more than
            ``MAX_FILE_BYTES``.
        OSError: it cannot be opened (``FileNotFoundError``, ``IsADirectoryError``, ...).
    """

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer

    with open(path, "rb", opener=opener) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"source {path!r} must be a regular file")
        if status.st_size > MAX_FILE_BYTES:
            message = f"must have at most MAX_FILE_BYTES = {MAX_FILE_BYTES}; got {status.st_size}"
            raise ValueError(f"source {path!r} {message}")
        yield file


def picture_digest(path: str) -> str:
    """SHA-256 of a picture file, in hexadecimal.

    Raises:
        OSError, ValueError: those of :func:`open_file`.
    """
    with open_file(path) as file:
        return sha256_of(file)


def open_picture(file: IO[bytes], *, header_only: bool = False) -> Image.Image:
    """``Image.open`` for a file that may be hostile.

    Args:
        file: opened, seekable; it has to stay open until the picture is loaded.
        header_only: the picture is not going to be loaded, so the parts that hold its pixels are
            not counted, which would read all of a JPEG.

    Returns:
        The picture, not yet loaded (an ICO is).

    Raises:
        ValueError: a format that is not in ``FORMATS``, no picture at all, or a file that goes over
            a limit. What a damaged file makes Pillow raise comes through.
    """
    _check_structure(file, _HEADER_CHECKS if header_only else _CHECKS)
    metered = _Metered(file)
    try:
        image = Image.open(cast("IO[bytes]", metered), formats=_formats())
    except UnidentifiedImageError:
        formats = ", ".join(_formats())
        found = _recognise(file)
        what = f"it looks like {found}, which is" if found else "it is damaged, or"
        raise ValueError(f"{what} not one of {formats}") from None
    metered.start_pixels()
    return image


def _check_structure(file: IO[bytes], checks: Checks) -> None:
    """Refuse a file whose parts are more than a decoder should have to visit."""
    file.seek(0)
    prefix = file.read(8)
    for signature, check in checks:
        if re.match(signature, prefix, re.DOTALL):
            file.seek(0)
            check(file)
    file.seek(0)


def check_opened(image: Image.Image) -> None:
    """The same for an image that the caller opened with Pillow, and that is decoded here.

    Raises:
        ValueError: its format is not in ``FORMATS``, or its file goes over a limit.
    """
    if not isinstance(image, ImageFile.ImageFile):
        return  # its pixels are in memory
    if image.format not in (*FORMATS, "MPO"):
        formats = ", ".join(_formats())
        message = f"{image.format} is not one of {formats}; if you trust it, pass image.copy()"
        raise ValueError(message)
    if image.tile and image.fp is not None:  # not loaded yet
        position = image.fp.tell()
        _check_structure(image.fp, _CHECKS)
        image.fp.seek(position)


def check_pixels(height: int, width: int) -> None:
    """Raises ValueError for more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.

    Pillow itself only warns between one and two times the limit. Asking it to raise would change
    warning filters, which all threads share.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        size = f"{height}x{width} = {height * width} pixels"
        raise ValueError(f"{size} exceed PIL.Image.MAX_IMAGE_PIXELS = {limit}")


@functools.cache
def _formats() -> list[str]:
    """Those of ``FORMATS`` that this Pillow has: older ones know no AVIF."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _recognise(file: IO[bytes]) -> str | None:
    """The format of a file that is not decoded, by its first bytes alone."""
    file.seek(0)
    prefix = file.read(16)
    for signature, name in _SIGNATURES:
        if signature.match(prefix):
            return name
    for name, (_, accept) in Image.OPEN.items():
        try:
            accepted = name not in FORMATS and accept is not None and accept(prefix)
        except (IndexError, TypeError, struct.error):
            continue  # fewer bytes than a signature has
        if accepted and not isinstance(accepted, str):
            return name
    return None


class _Metered:
    """The part of a file that Pillow uses, for a limited number of reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.seek, self.tell, self.fileno = file.seek, file.tell, file.fileno
        self._reads_left = MAX_HEADER_READS
        # A header is read once or twice; 1 MiB is for small files.
        self._bytes_left: float = 4 * size + 2**20

    def start_pixels(self) -> None:
        """The header is read. Bytes do not count now: Pillow may take 64 KiB for each strip."""
        self._reads_left = MAX_READS
        self._bytes_left = math.inf

    def read(self, size: int = -1) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ValueError(
                "it is cut into too many parts: more than MAX_HEADER_READS = "
                f"{MAX_HEADER_READS} of metadata, or MAX_READS = {MAX_READS} of pixels"
            )
        data = self._file.read(size)
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise ValueError("parts of its header overlap: they hold four times the file's bytes")
        return data


def _check_jpeg(file: IO[bytes]) -> None:
    """Count scans: each goes over the whole picture, and an empty one takes ten bytes."""
    scans = exif = 0
    for segments, (marker, length, start) in enumerate(_segments(file), 1):
        scans += marker == 0xDA
        if marker == 0xE1 and start == b"Exif\x00\x00":
            exif += length
        if scans > MAX_SCANS:
            raise ValueError(f"a JPEG may have at most MAX_SCANS = {MAX_SCANS} scans")
        if segments > MAX_SEGMENTS:
            raise ValueError(f"a JPEG may have at most MAX_SEGMENTS = {MAX_SEGMENTS} segments")
        check_exif(exif)


def check_exif(size: int) -> None:
    """Raises ValueError for more than ``MAX_EXIF_BYTES`` of EXIF data."""
    if size > MAX_EXIF_BYTES:
        raise ValueError(f"its EXIF data exceed MAX_EXIF_BYTES = {MAX_EXIF_BYTES}")


def _segments(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Marker, length and first bytes of each segment of a JPEG, up to its end.

    As libjpeg finds them: what is no marker between two segments is skipped, like a scan's data.
    """
    data, at = b"", 0
    while True:
        match = _MARKER.search(data, at)
        if match is None:
            block = file.read(_BLOCK)
            if not block:
                return
            data, at = (b"\xff" if data.endswith(b"\xff") else b"") + block, 0
            continue
        at = match.end()
        marker = data[at - 1]
        if marker == 0xD9:  # the end
            return
        if marker < 0xC0 or marker == 0xD8:  # no segment: reserved, or the picture's beginning
            continue
        if at + 8 > len(data):  # its head is in the next block
            file.seek(at - len(data), os.SEEK_CUR)
            data, at = file.read(_BLOCK), 0
        head = data[at : at + 8]
        length = int.from_bytes(head[:2], "big")
        yield marker, length, head[2:]
        at += max(length, 2)
        if at > len(data):
            file.seek(at - len(data), os.SEEK_CUR)
            data, at = b"", 0


def _check_png(file: IO[bytes], most_pixels: int = MAX_IMAGE_CHUNKS) -> None:
    """Count chunks, and let there be one profile: each unpacks to as much as 1 MiB."""
    file.seek(len(_PNG), os.SEEK_CUR)
    pixels = others = profiles = 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        if kind in (b"IDAT", b"fdAT", b"fcTL"):
            pixels += 1
        else:
            others += 1
        profiles += kind == b"iCCP"
        if profiles > 1:
            raise ValueError("a PNG may have at most 1 iCCP chunk")
        if others > MAX_OTHER_CHUNKS:
            name = f"MAX_OTHER_CHUNKS = {MAX_OTHER_CHUNKS}"
            raise ValueError(f"a PNG may have at most {name} chunks that hold no pixels")
        if pixels > most_pixels:
            raise ValueError(f"a PNG may have at most {most_pixels} chunks of pixels")
        file.seek(length + 4, os.SEEK_CUR)


def _check_tiff(file: IO[bytes]) -> None:
    """Count what the first directory lists, and measure its tiles, which may exceed the picture."""
    head = file.read(16).ljust(16, b"\0")
    order = ">" if head.startswith(b"MM") else "<"
    big = 43 in head[2:4]
    if big and order == ">":
        raise ValueError("a BigTIFF must be little-endian: Pillow takes this one for a plain TIFF")
    (offset,) = struct.unpack_from("<Q" if big else order + "I", head, 8 if big else 4)
    entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    if offset >= 2**63:
        return
    file.seek(offset)
    count = int.from_bytes(file.read(8 if big else 2), "little" if order == "<" else "big")
    tile = {322: 1, 323: 1}
    for _ in range(min(count, 2**16)):
        data = file.read(entry.size)
        if len(data) < entry.size:
            return
        tag, kind, number, value = entry.unpack(data)
        if number > MAX_TAG_VALUES and (tag in _TIFF_LISTS or kind not in _TIFF_BYTES):
            raise ValueError(
                f"a tag of a TIFF may hold at most MAX_TAG_VALUES = {MAX_TAG_VALUES} numbers; tag "
                f"{tag} holds {number}"
            )
        if tag in tile:
            if kind not in (3, 4) or number != 1:
                raise ValueError(f"tag {tag} of a TIFF must be one SHORT or LONG")
            (tile[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), value)
    check_pixels(tile[323], tile[322])


def _check_ico(file: IO[bytes]) -> None:
    """Its pictures are PNGs or BMPs of any size, which Pillow decodes in ``Image.open``."""
    count = int.from_bytes(file.read(6)[4:], "little")
    if count > MAX_ICONS:
        raise ValueError(f"an ICO may have at most MAX_ICONS = {MAX_ICONS} pictures; got {count}")
    for entry in [file.read(16) for _ in range(count)]:
        offset = int.from_bytes(entry[12:], "little")
        file.seek(offset)
        head = file.read(24).ljust(24, b"\0")
        if head.startswith(_PNG):
            width, height = struct.unpack_from(">II", head, 16)
            file.seek(offset)
            # Few chunks: a hundred pictures may share theirs.
            _check_png(file, MAX_OTHER_CHUNKS)
        else:  # a BMP, of OS/2 or of Windows, with a mask as high as the picture below it
            form = "<HH" if head[0] == 12 else "<Ii"
            width, height = struct.unpack_from(form, head, 4)
            height = abs(height) // 2
        check_pixels(height, width)


def _check_plain_ppm(file: IO[bytes]) -> None:
    """Decimal digits and comments are parsed in Python."""
    size = comments = 0
    while block := file.read(_BLOCK):
        size += len(block)
        comments += block.count(b"#")
        if size > MAX_PLAIN_BYTES:
            name = f"MAX_PLAIN_BYTES = {MAX_PLAIN_BYTES}"
            raise ValueError(f"a PPM in decimal digits may have at most {name}")
        if comments > MAX_PLAIN_COMMENTS:
            name = f"MAX_PLAIN_COMMENTS = {MAX_PLAIN_COMMENTS}"
            raise ValueError(f"a PPM in decimal digits may have at most {name}")


def _check_avif(file: IO[bytes]) -> None:
    """Measure its lists, in which libavif searches for each of their entries."""
    lists = 0
    for _ in range(MAX_BOXES):
        head = file.read(16)
        if len(head) < 8:
            return
        size, kind = struct.unpack_from(">I4s", head)
        if size == 1:  # it follows
            size = int.from_bytes(head[8:], "big")
        if kind in (b"meta", b"moov"):
            lists += size or MAX_BOX_BYTES + 1  # 0: all that is left
        if lists > MAX_BOX_BYTES:
            name = f"MAX_BOX_BYTES = {MAX_BOX_BYTES}"
            raise ValueError(f"the lists of an AVIF may have at most {name}")
        if not 8 <= size < 2**62:
            return
        file.seek(size - len(head), os.SEEK_CUR)
    raise ValueError(f"an AVIF may have at most MAX_BOXES = {MAX_BOXES} boxes")


# By the first 8 bytes of a file, as Pillow's plugins tell their formats.
Checks: TypeAlias = tuple[tuple[bytes, Callable[[IO[bytes]], None]], ...]

_HEADER_CHECKS: Checks = (
    (rb"II|MM", _check_tiff),
    (rb"\x00\x00\x01\x00", _check_ico),
    (rb"....ftyp", _check_avif),
)
_CHECKS: Checks = (
    *_HEADER_CHECKS,
    (rb"\xff\xd8\xff", _check_jpeg),
    (re.escape(_PNG), _check_png),
    (rb"P[123]", _check_plain_ppm),
)
