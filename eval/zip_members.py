"""The members of a zip file as byte ranges: read at random, by any number of threads and processes, without a handle.

Layout of the local header as in PKWARE's APPNOTE 6.3, section 4.3.7.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

HEADER_BYTES, NAME_LENGTH, EXTRA_LENGTH = 30, slice(26, 28), slice(28, 30)
DEFLATE_WITHOUT_HEADER = -15
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, UnicodeDecodeError)
"""What Python's zipfile raises on broken files."""


class Member(NamedTuple):
    """One file inside a zip."""

    name: str
    header: int
    """Where its local header begins."""
    stored: int
    """Bytes that it takes in the zip."""
    size: int
    """Bytes that it has when it is unpacked."""
    method: int
    """zipfile.ZIP_STORED or zipfile.ZIP_DEFLATED."""
    crc: int


def list_members(path: Path) -> list[Member]:
    """The files of a zip in the order of its directory.

    Raises:
        ValueError: not a whole zip, or a member is encrypted, packed otherwise than stored or deflated, or there twice.
    """
    with opened(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
    twice = next((name for name, times in Counter(info.filename for info in infos).items() if times > 1), None)
    if twice is not None:
        raise ValueError(f"{path} member {twice}: there several times, and it is unclear which counts; zip it anew")
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path} member {info.filename}: encrypted or packed by a rare method; zip it plainly")
    return [
        Member(info.filename, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
        for info in infos
    ]


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip for reading; whatever proves damaged while it is open becomes a ValueError that names the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGE as error:
        raise ValueError(f"{path}: not a whole zip file ({error}); fetch or write it again") from error


def read_member(path: Path, member: Member) -> bytes:
    """The unpacked bytes of a member.

    Raises:
        ValueError: they are cut or altered.
    """
    with open(path, "rb") as stream:
        stream.seek(_start(stream, path, member))
        data = stream.read(member.stored)
    if member.method == zipfile.ZIP_DEFLATED:
        try:
            # One byte more than promised is enough to tell that the promise is false.
            data = zlib.decompressobj(DEFLATE_WITHOUT_HEADER).decompress(data, member.size + 1)
        except zlib.error as error:
            raise ValueError(f"{path} member {member.name}: damaged ({error}); fetch or write it again") from error
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ValueError(f"{path} member {member.name}: does not match its checksum; fetch or write the zip again")
    return data


def data_offset(path: Path, member: Member) -> int:
    """Where the bytes of a member begin; a stored one lies there as it is.

    Raises:
        ValueError: the directory of the zip points beside the member, or beyond the file.
    """
    with open(path, "rb") as stream:
        return _start(stream, path, member)


def _start(stream: BinaryIO, path: Path, member: Member) -> int:
    stream.seek(max(member.header, 0))
    header = stream.read(HEADER_BYTES)
    lengths = (int.from_bytes(header[part], "little") for part in (NAME_LENGTH, EXTRA_LENGTH))
    start = member.header + HEADER_BYTES + sum(lengths)
    beyond = member.header < 0 or start + member.stored > os.fstat(stream.fileno()).st_size
    if beyond or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} member {member.name}: not where the zip says; fetch or write the zip again")
    return start
