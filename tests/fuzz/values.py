"""Values, names and texts that programs trip over, and changes of nested values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63),
    *(2**64, -(2**31), -(2**63), 10**14, 10**30, 10**400, 0.5, -0.0, 1e300, 1e-320),
    *(math.nan, math.inf, -math.inf),
)
NAMES = (
    *("", ".", "..", "/", "../canary", "../canary/secret", "../../canary/secret", "../canary/secret.tif"),
    *("/etc/passwd", "/dev/zero", "/proc/self/mem", "/dev/stdin", "a\0b", "\x1b[31mred\x1b[0m", "\u202etxt"),
    *("[bold]b[/bold]", "<script>alert(1)</script>", "x" * 300, "0" * 5000, "zarr.json", "NaN", "1e999", "é"),
    *(
        "uint8",
        "<u2",
        "|O",
        ">f8",
        "<M8[ns]",
        "complex128",
        "V8",
        "r8",
        "string",
        "os:system",
        "gzip",
        "pickle",
    ),
)
"""Names; ``../canary`` is a folder beside the one that is opened, which nothing may look into."""


def odd_value(random: Random, names: tuple[str, ...] = NAMES) -> Any:
    """A value of any type that JSON has."""
    kind = random.randrange(9)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 6:
        return random.choice(names)
    return random.choice(
        [
            None,
            True,
            False,
            [],
            {},
            [[]],
            {"": None},
            [None] * 5,
            nested(random.choice([5, 40, 900])),
            [1, "a"],
        ]
    )


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


def changed(random: Random, value: Any, odd: Callable[[Random], Any] = odd_value) -> Any:
    """``value`` with one to three changes: of values, of keys, and of the order of things."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        value = _once(random, value, odd)
    return value


def _once(random: Random, value: Any, odd: Callable[[Random], Any]) -> Any:
    places = list(_places(value))
    if not places:
        return odd(random)
    holder, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(random.randrange(len(holder) + 1), holder[key])
        case 1:
            holder[random.choice(NAMES)] = holder[key]
        case 2:
            other, there = random.choice(places)
            if not _is_in(other, holder[key]):
                other[there] = holder[key]
        case 3 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * random.choice([-1, 0, 2, 10**6, 10**12, 0.5])
        case 4:
            holder[key] = [holder[key]]
        case _:
            holder[key] = odd(random)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All entries of a nested value, each as its container and key."""
    todo = [value]
    while todo:
        holder = todo.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            yield holder, key
            todo.append(holder[key])


def _is_in(inner: Any, outer: Any) -> bool:
    todo = [outer]
    while todo:
        each = todo.pop()
        if each is inner:
            return True
        todo += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return False
