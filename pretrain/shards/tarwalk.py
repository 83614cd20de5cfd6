"""Where every member of a tar lies, from its 512-byte headers alone.

Only headers are read (a pread of a few kilobytes each), so an index of a shard costs microseconds a sample
whatever the images weigh, several times less than `tarfile`, which builds an object a member and stops at
the first damaged header. Here the walk goes on after damage at the next block that is a header beyond doubt
("ustar" magic and a right checksum) and says what it passed over.

Understood: ustar with its prefix field, GNU long names (L, K), pax headers (x, g: path and size), base-256
sizes, V7. Not understood, and reported as a gap: sparse members. Links, folders and devices have no bytes and
are passed over. A nested tar inside a damaged region can lend its members to the shard: headers do not say
whose they are.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
ZEROS = bytes(BLOCK)
WINDOW = 4096  # read at once at a header: small members (captions, classes) bring the next headers along
SCAN = 1 << 20  # read at once while looking for the next header after damage
MAX_EXTENSION = 1 << 20  # longest long-name or pax block believed, bytes
REGULAR = frozenset(b"\x000" + b"7")
EXTENSIONS = frozenset(b"LKxgX")  # their bytes are about the next member
BODILESS = frozenset(b"123456")  # hard link, symlink, character, block, folder, fifo: no data blocks whatever size says


class Member(NamedTuple):
    """A regular file: its bytes are ``tar[offset : offset + size]``."""

    name: str
    offset: int
    size: int


class Gap(NamedTuple):
    """Bytes ``start`` to ``stop`` that hold no member one can trust; `name` is the member they were of, if
    known."""

    start: int
    stop: int
    reason: str
    name: str | None = None


class Header(NamedTuple):
    kind: int  # type flag, a byte
    name: bytes
    size: int


class _Damaged(Exception):
    """A block that should be a header (or a pax block) is not."""


class _Window:
    """pread with a small look-ahead."""

    def __init__(self, fd: int):
        self.fd, self.start, self.data = fd, 0, b""

    def block(self, at: int) -> bytes:
        begin = at - self.start
        if begin < 0 or begin + BLOCK > len(self.data):
            self.start, self.data, begin = at, os.pread(self.fd, WINDOW, at), 0
        return self.data[begin : begin + BLOCK]


def checksum_is_right(block: bytes) -> bool:
    """Whether the header's checksum fits: the sum of its bytes with the checksum field read as spaces.

    adler32's low half is 1 + that sum modulo 65521, forty times faster than ``sum`` in Python. The sum of
    *signed* bytes, which old Sun and NeXT tars wrote, is tried when the unsigned one does not fit.
    """
    try:
        stored = _octal(block[148:156])
    except ValueError:
        return False
    if not 0 <= stored <= 255 * BLOCK:
        return False
    blanked = block[:148] + b"        " + block[156:]
    if zlib.adler32(blanked) & 0xFFFF == (stored + 1) % 65521:
        return True
    return sum(b - 256 if b > 127 else b for b in blanked) == stored


def _octal(field: bytes) -> int:
    text = field.partition(b"\0")[0]
    return int(text, 8) if text.strip() else 0


def _number(field: bytes) -> int:
    """Octal text, or base-256 with the top bit set (GNU, for sizes from 8 GiB)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return -1 if field[0] == 0xFF else value
    return _octal(field)


def parse_header(block: bytes) -> Header:
    """The fields that matter of one header block; raises `_Damaged` when it is none."""
    if not checksum_is_right(block):
        raise _Damaged("damaged header")
    try:
        size = _number(block[124:136])
    except ValueError:
        size = -1
    if size < 0:
        raise _Damaged("header with an impossible size")
    kind = block[156]
    name = block[:100].partition(b"\0")[0]
    # GNU's magic is "ustar  ": there the prefix field holds times, not a folder
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    if kind == 0 and name.endswith(b"/"):
        kind = ord("5")  # V7 has no type for folders
    return Header(kind, name, size)


def parse_pax(data: bytes) -> dict[bytes, bytes]:
    """``length key=value\\n`` records; raises `_Damaged` where they do not add up."""
    values: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 20)
        length = int(data[at:space]) if space > at and data[at:space].isdigit() else 0
        record = data[space + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or at + length > len(data) or record[-1:] != b"\n":
            raise _Damaged("damaged pax header")
        values[key] = value
        at += length
    return values


def find_header(fd: int, at: int, length: int) -> int | None:
    """The first block from `at` (a multiple of 512) on that is a header beyond doubt, or None."""
    while at + BLOCK <= length:
        chunk = os.pread(fd, SCAN, at)
        found = chunk.find(b"ustar")
        while found >= 0:
            start = found - 257
            block = chunk[start : start + BLOCK] if start >= 0 and start % BLOCK == 0 else b""
            if len(block) == BLOCK and checksum_is_right(block):
                return at + start
            found = chunk.find(b"ustar", found + 1)
        if not chunk:
            return None
        at += max(len(chunk) // BLOCK, 1) * BLOCK
    return None


class _Extensions:
    """Long names and pax values read ahead of the member they are for."""

    def __init__(self, fd: int):
        self.fd = fd
        self.always: dict[bytes, bytes] = {}  # from global pax headers
        self.once: dict[bytes, bytes] = {}  # for the next member only

    def read(self, header: Header, body: int) -> None:
        if header.size > MAX_EXTENSION:
            raise _Damaged(f"long name or pax header of {header.size} bytes")
        data = os.pread(self.fd, header.size, body)
        if header.kind == ord("L"):
            self.once[b"path"] = data.partition(b"\0")[0]
        elif header.kind == ord("g"):
            self.always.update(parse_pax(data))
        elif header.kind in b"xX":
            self.once = {**parse_pax(data), **self.once}

    def apply(self, header: Header) -> Header:
        """The header with its long name and size; what was for one member is forgotten."""
        values, self.once = {**self.always, **self.once}, {}
        size = values.get(b"size", b"")
        if size and not size.isdigit():
            raise _Damaged("pax header with an impossible size")
        sparse = any(key.startswith(b"GNU.sparse.") for key in values)
        return Header(
            ord("S") if sparse else header.kind,
            values.get(b"path", header.name),
            int(size) if size else header.size,
        )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _step(block: bytes, at: int, length: int, extensions: _Extensions) -> tuple[Member | Gap | None, int]:
    """What the header at `at` announces, and where the next one is; raises `_Damaged`."""
    if len(block) < BLOCK:
        raise _Damaged("cut short inside a header")
    header, body = parse_header(block), at + BLOCK
    if header.kind in EXTENSIONS:
        if body + header.size > length:
            raise _Damaged("cut short inside a long name or pax header")
        extensions.read(header, body)
        return None, body + _padded(header.size)
    if extensions.once or extensions.always:
        header = extensions.apply(header)
    if header.kind in BODILESS:
        return None, body
    name = header.name.decode("utf-8", "backslashreplace")
    if body + header.size > length:
        raise _Damaged(f"cut short: {header.size} bytes announced, {length - body} there", name)
    if header.kind in REGULAR:
        return Member(name, body, header.size), body + _padded(header.size)
    if header.kind == ord("S"):
        gap = Gap(at, body + header.size, "sparse member, not read: make the tar without --sparse", name)
        return gap, body + _padded(header.size)
    return None, body + _padded(header.size)


def walk(fd: int, length: int) -> Iterator[Member | Gap]:
    """Members and gaps of the tar open at `fd`, `length` bytes long, in file order.

    Names are UTF-8; other bytes become ``\\xNN`` in plain text, so that every name can be printed and logged.
    A whole tar gives no gap. One cut short ends in a gap; so does one without the end mark of zeros, which
    may be cut at a member's edge.
    """
    window, extensions = _Window(fd), _Extensions(fd)
    at = 0
    while at < length:
        block = window.block(at)
        if block == ZEROS:
            resume = find_header(fd, at, length)
            if resume is None:
                return
            yield Gap(at, resume, "zeroed blocks, or the seam of two joined tars")
            at = resume
            continue
        try:
            found, at = _step(block, at, length, extensions)
        except _Damaged as damage:
            extensions.once = {}
            start, at = at, find_header(fd, at + BLOCK, length) or length
            yield Gap(start, at, *damage.args)
            if at == length:
                return
        else:
            if found:
                yield found
    yield Gap(length, length, "no end mark: perhaps cut short" if length else "0 bytes long")
