"""Bytes, counts and seconds as text, and text as bytes.

The only module that divides by 1000 or 1024: everywhere else bytes are ``int``.
"""

from __future__ import annotations

import re
from fractions import Fraction
from numbers import Integral

_BYTES_PER_UNIT = {
    "": 1,
    "B": 1,
    "BYTE": 1,
    "BYTES": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_ALLOWED = (
    "a positive int of bytes, or a number with one of B, KB, MB, GB, TB (powers of 1000), "
    "KiB, MiB, GiB, TiB (powers of 1024); for example '11GB' or '1.5 GiB'"
)


def parse_bytes(value: int | str | None) -> int | None:
    """Parse a number of bytes; None, which stands for no limit, stays None.

    ``"11GB"`` is 11 * 10^9, ``"11GiB"`` is 11 * 2^30; a number alone is bytes. Case does not matter, and a
    fraction of a byte is dropped.

    Raises
    ------
    ValueError
        If the value is not positive or cannot be read as bytes.
    """
    if value is None:
        return None
    # A bool in place of a size is a mistake, although to Python it is an int.
    if isinstance(value, bool) or not isinstance(value, Integral | str):
        raise _not_bytes(value)
    nbytes = _parse_text(value) if isinstance(value, str) else int(value)
    if nbytes <= 0:
        raise _not_bytes(value)
    return nbytes


def format_bytes(nbytes: int) -> str:
    """``nbytes`` in the largest binary unit that leaves a number of at least 1, with 3 digits."""
    return plural(nbytes, "byte") if abs(nbytes) < 2**10 else _scaled(nbytes, 2**10, _BINARY_UNITS)


def format_count(count: int | float) -> str:
    """A count or a number of operations with 3 digits and k, M, G, T or P for powers of 1000."""
    return f"{count:.3g}" if abs(count) < 999.5 else _scaled(count, 1000, tuple("kMGTP"))


def plural(count: int, noun: str) -> str:
    """``count`` and its noun: ``"1 map"``, ``"2 maps"``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_duration(seconds: float) -> str:
    """A duration in seconds as text: ``0.85 s``, ``42.0 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 59.95:
        return f"{_three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _parse_text(text: str) -> int:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match[2].upper() not in _BYTES_PER_UNIT:
        raise _not_bytes(text)
    # Exact arithmetic: 1.1 GB as a product of floats would be one byte off.
    return int(Fraction(match[1]) * _BYTES_PER_UNIT[match[2].upper()])


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """``value`` in the first of ``units``, powers of ``base``, in which it is shown below ``base``."""
    exponent = 1
    while exponent < len(units) and abs(value) / base**exponent >= base - 0.5:
        exponent += 1
    return f"{_three_digits(value / base**exponent)} {units[exponent - 1]}"


def _three_digits(scaled: float) -> str:
    magnitude = abs(scaled)
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{scaled:.{decimals}f}"


def _not_bytes(value: object) -> ValueError:
    return ValueError(f"cannot read {value!r} as a number of bytes: allowed is {_ALLOWED}")
