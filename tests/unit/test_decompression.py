"""What is decompressed is bounded before it is: of a bomb, no more than the bound and a byte is ever made."""

from __future__ import annotations

import bz2
import lzma
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import compression

from kafka_delivery import settings
from kafka_delivery_worker import decompression
from kafka_delivery_worker.decompression import BodyTooLargeError, bound_kombu, decompress, most_bytes

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": zlib.compress, "bzip2": bz2.compress, "lzma": lzma.compress}


@pytest.fixture
def kombus() -> Iterator[None]:
    """Kombu's own decompression, when the test is done."""
    before = dict(compression._decoders)
    yield
    compression._decoders.update(before)


@pytest.mark.parametrize("name", COMPRESS)
class TestEach:
    def test_what_kombu_compresses_comes_back(self, name: str) -> None:
        body, content_type = compression.compress(b"body" * 1000, name)
        assert decompress(body, content_type) == decompress(body, name) == b"body" * 1000

    def test_exactly_as_much_as_may_be(self, name: str) -> None:
        most = most_bytes()
        assert len(decompress(COMPRESS[name](b"0" * most), name)) == most
        with pytest.raises(BodyTooLargeError, match=str(most)):
            decompress(COMPRESS[name](b"0" * (most + 1)), name)

    def test_a_bomb_takes_no_memory(self, name: str) -> None:
        bomb = COMPRESS[name](b"0" * 100_000_000)
        tracemalloc.start()
        with pytest.raises(BodyTooLargeError):
            decompress(bomb, name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * most_bytes()

    @pytest.mark.parametrize("spoil", [lambda b: b[:-3], lambda b: b + b"more", lambda b: b + b, lambda b: b"x" + b])
    def test_what_is_not_one_whole_stream(self, name: str, spoil: Callable[[bytes], bytes]) -> None:
        with pytest.raises((zlib.error, OSError, lzma.LZMAError)):
            decompress(spoil(COMPRESS[name](b"body")), name)

    def test_kombu_is_bounded_too(self, name: str, kombus: None) -> None:
        bound_kombu()
        assert compression.decompress(COMPRESS[name](b"body"), name) == b"body"
        with pytest.raises(BodyTooLargeError):
            compression.decompress(COMPRESS[name](b"0" * (most_bytes() + 1)), name)


@pytest.mark.parametrize("name", ["brotli", "application/x-brotli", "unheard-of", "", None, 7, True])
def test_what_cannot_stop_or_is_not_known_is_refused(name: Any) -> None:
    with pytest.raises(KeyError):
        decompress(b"body", name)


def test_kombu_knows_none_that_is_not_bounded(kombus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brotli, where somebody has installed it: nothing can stop it in the middle."""
    monkeypatch.setitem(compression._encoders, "application/x-brotli", bytes)
    monkeypatch.setitem(compression._decoders, "application/x-brotli", lambda body: b"0" * 10**9)
    monkeypatch.setitem(compression._aliases, "brotli", "application/x-brotli")
    bound_kombu()
    with pytest.raises(KeyError):
        compression.decompress(b"bomb", "brotli")


def test_the_bound_follows_the_largest_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_bytes() == decompression.LEAST_BYTES == 8_000_000
    monkeypatch.setenv("KAFKA_DELIVERY_MAX_RECORD_BYTES", "10000000")
    settings.current.cache_clear()
    try:
        assert most_bytes() == 40_000_000
    finally:
        monkeypatch.undo()
        settings.current.cache_clear()
