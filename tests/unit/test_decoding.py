"""What the fast readers do not take, the standard library reads as it always did."""

from __future__ import annotations

import binascii
import math
from typing import Any

import pytest

from kafka_delivery_worker.decoding import loads, unbase64


@pytest.mark.parametrize("text", ["YWJj", b"YWJj", "YWJj\n", "YW\nJj", "YW=Jj", ""], ids=repr)
def test_base64_as_python_reads_it(text: str | bytes) -> None:
    assert unbase64(text) == binascii.a2b_base64(text)


@pytest.mark.parametrize("text", ["YQ", "YW-Jj", "YW\xe9j"], ids=repr)
def test_what_is_no_base64_is_refused_or_skipped_as_python_does(text: str) -> None:
    def read(decode: Any) -> Any:
        try:
            return decode(text)
        except ValueError as error:
            return str(error)

    assert read(unbase64) == read(binascii.a2b_base64)


def test_json_that_only_python_reads() -> None:
    assert loads(b'{"a": [1]}') == {"a": [1]}
    assert math.isnan(loads("NaN"))
    with pytest.raises(ValueError, match="Expecting"):
        loads("{")
