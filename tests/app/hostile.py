"""Files by those who mean ill."""

import struct
import zlib


def chunk(name: bytes, data: bytes) -> bytes:
  """Makes a part of a PNG file."""
  checksum = struct.pack(">I", zlib.crc32(name + data))
  return struct.pack(">I", len(data)) + name + data + checksum


def png(width: int, height: int, data: bytes) -> bytes:
  """Makes a file that says what it likes of its size."""
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", data)
    + chunk(b"IEND", b"")
  )


def bomb() -> bytes:
  """Makes a file of 4 KB that is 4 GB of zeros, once decoded."""
  return png(40_000, 40_000, zlib.compress(bytes(4_000_000)))
