"""Xet storage in a folder, beside the loopback Hub.

UNDOCUMENTED: hf_xet (1.8) takes ``local:///folder`` as the address of the storage, writes its real
chunks and shards there and reads them back. Neither that address nor the folder's layout is
promised by anyone; with another hf_xet this may stop working. The LFS path is the one to rely on.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ENTRY = 48  # bytes of every record of a shard's file section
VERIFICATION, METADATA = 1 << 31, 1 << 30  # flags of a file: what follows its segments

READ = """
import sys, hf_xet
url, hash, size, target = sys.argv[1:]
with hf_xet.XetSession().new_file_download_group(endpoint=url) as group:
    group.start_download_file(hf_xet.XetFileInfo(hash, int(size)), target)
"""


class XetFile(NamedTuple):
    hash: str
    sha256: str
    size: int


def _hex(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian words, each printed as a number."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def files_of_shard(shard: bytes) -> Iterator[XetFile]:
    """The files that a shard describes; those without a sha256 are left out."""
    at = ENTRY
    while shard[at : at + 32] != b"\xff" * 32:
        name, flags, count = struct.unpack_from("<32sII", shard, at)
        at += ENTRY
        size = sum(
            struct.unpack_from("<I", shard, at + i * ENTRY + 36)[0]
            for i in range(count)
        )
        at += count * ENTRY * (2 if flags & VERIFICATION else 1)
        if flags & METADATA:
            yield XetFile(_hex(name), _hex(shard[at : at + 32]), size)
            at += ENTRY


class XetStore:
    """The folder behind ``casUrl``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = f"local://{folder}"

    def find(self, sha256: str) -> XetFile | None:
        """The stored file with that content, as the uploaded shards say."""
        for shard in sorted(self.folder.glob("xet/xorbs/shards/*.mdb")):
            for file in files_of_shard(shard.read_bytes()):
                if file.sha256 == sha256:
                    return file
        return None

    def read(self, hash: str, size: int) -> bytes:
        """The content, put together by hf_xet in a process that gives the folder free again."""
        target = self.folder / f"read-{hash}"
        command = [sys.executable, "-c", READ, self.url, hash, str(size), str(target)]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        data = target.read_bytes()
        target.unlink()
        return data
