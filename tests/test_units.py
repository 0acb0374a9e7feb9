"""Bytes as text and text as bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcnn.support.units import format_bytes, format_count, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("7B", 7),
        ("7 bytes", 7),
        ("3kb", 3 * 10**3),
        ("512 MB", 512 * 10**6),
        ("11GB", 11 * 10**9),
        ("2TB", 2 * 10**12),
        ("1KiB", 2**10),
        ("400MiB", 400 * 2**20),
        ("11GiB", 11 * 2**30),
        ("  1.5 gib ", 3 * 2**29),
        ("2TIB", 2**41),
        ("1.1GB", 1_100_000_000),
        (np.int64(5), 5),
        (None, None),
    ],
)
def test_parse_bytes(value: int | str | None, nbytes: int | None) -> None:
    assert parse_bytes(value) == nbytes


@pytest.mark.parametrize(
    "value", ["banana", "", "GB", "-1GB", "0", "0.4 B", "nan", "inf", "1e9", "11G", "1,5GB"]
)
def test_parse_bytes_refuses_text_that_is_no_positive_size(value: str) -> None:
    with pytest.raises(ValueError, match=rf"^cannot read {value!r} as .* allowed is .* for example '11GB'"):
        parse_bytes(value)


@pytest.mark.parametrize(
    "value", [-1, 0, True, False, math.nan, 1.5, [1], "1 2", "\N{ARABIC-INDIC DIGIT ONE}GB"]
)
def test_parse_bytes_refuses_values_that_are_no_positive_size(value: object) -> None:
    with pytest.raises(ValueError, match=r"number of bytes: allowed is .* for example '11GB'") as caught:
        parse_bytes(value)  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


@given(st.integers(1, 2**60))
def test_plain_numbers_survive(nbytes: int) -> None:
    assert parse_bytes(nbytes) == parse_bytes(str(nbytes)) == parse_bytes(f"{nbytes} B") == nbytes


@given(st.integers(1, 2**60))
def test_formatted_bytes_parse_to_within_half_of_the_last_digit(nbytes: int) -> None:
    parsed = parse_bytes(format_bytes(nbytes))
    assert parsed is not None
    assert abs(parsed - nbytes) <= 0.005 * nbytes + 1


@given(st.integers(1, 1023), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_whole_units_round_trip_exactly(count: int, unit: str) -> None:
    nbytes = parse_bytes(f"{count}{unit}")
    assert nbytes is not None
    assert parse_bytes(format_bytes(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (400 * 2**20, "400 MiB"),
        (11 * 10**9, "10.2 GiB"),
        (-3 * 2**30, "-3.00 GiB"),
        (5 * 2**52, "20480 TiB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.00 k"), (999_600, "1.00 M"), (3.5e9, "3.50 G")]
)
def test_format_count(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.851, "0.85 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
