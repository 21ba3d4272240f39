"""Compressed bodies, decompressed up to a bound: a hundred kilobytes may hold gigabytes.

Our callers compress nothing unless a call says `compression=...`, which Celery and kombu do for them. What they make so
stays far below the bound. kombu itself knows none, for any transport.
"""

from __future__ import annotations

import bz2
import importlib
import lzma
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

from kombu import compression

from kafka_delivery import settings

LEAST_BYTES = 8_000_000
"""That a body may have, decompressed, with records of any size: what a claim brings at most."""

RECORDS = 4
"""The same in records of the largest size: JSON doubles one at most, and a callback may have another."""


class BodyTooLargeError(ValueError):
    """Raised for a body that would be larger, decompressed, than a message may be."""


def most_bytes() -> int:
    """How many bytes a body may have, decompressed."""
    return max(LEAST_BYTES, RECORDS * settings.current().max_record_bytes)


def decompress(body: Any, name: Any) -> bytes:
    """`body`, decompressed; no more than the bound and a byte is ever made of it.

    Args:
        body: text or bytes.
        name: of the compression, as the header `compression` has it.

    Raises:
        BodyTooLargeError: it would be too large.
        Exception: whatever the compression raises for what it cannot read. An unknown or unbounded one is a `KeyError`.
    """
    content_type = compression._aliases.get(name, name)
    return _BOUNDED[content_type](body.encode() if isinstance(body, str) else bytes(body), most_bytes())


def bound_kombu() -> None:
    """Let kombu decompress by this module, whatever the transport."""
    for content_type in compression.encoders():
        encode = compression._encoders[content_type]
        compression.register(encode, partial(decompress, name=content_type), content_type)


def _one_stream(make: Callable[[], Any], error: type[Exception], body: bytes, most: int) -> bytes:
    """Decompress one stream. What lies behind it was written by nobody's `compress`.

    Raises:
        BodyTooLargeError: it would be too large.
        Exception: `error` is cut short, none, or has something behind it.
    """
    stream = make()
    plain: bytes = stream.decompress(body, most + 1)
    if len(plain) > most:
        raise BodyTooLargeError(f"it has more than {most} bytes, decompressed")
    if not stream.eof or stream.unused_data:
        raise error("it is not one whole stream")
    return plain


def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


_BOUNDED: dict[str, Callable[[bytes, int], bytes]] = {
    "application/x-gzip": partial(_one_stream, zlib.decompressobj, zlib.error),
    "application/x-bz2": partial(_one_stream, bz2.BZ2Decompressor, OSError),
    "application/x-lzma": partial(_one_stream, lzma.LZMADecompressor, lzma.LZMAError),
}
"""By content type, of those that can stop. Brotli's Python interface cannot: it is refused."""

if (zstd := _zstd()) is not None:
    _BOUNDED["application/zstd"] = partial(_one_stream, zstd.ZstdDecompressor, zstd.ZstdError)
