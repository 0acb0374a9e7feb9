"""Python objects that code in a forward pass makes, keeps and asks, beyond plain numbers and lists."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.compatibility.case import SAME_OR_REFUSED, Cases, Small, between, passes

CASES = Cases("Python objects of all kinds")


class Keeping(Small):
    """Holds one object."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held


# --- deques, lists and dicts -------------------------------------------------------------------------


@CASES("a deque(maxlen=2) of features, the mean of which is taken off", passes(4))
class Recent(Keeping):
    def __init__(self) -> None:
        super().__init__(deque(maxlen=2))

    def late(self, v: Tensor) -> Tensor:
        self.held.append(v.detach().mean(0))
        return v - sum(self.held) / len(self.held)


@CASES("a full deque(maxlen=2) gets features on its left", passes(4))
class RecentLeft(Keeping):
    def __init__(self) -> None:
        super().__init__(deque(maxlen=2))

    def late(self, v: Tensor) -> Tensor:
        before = self.held[-1] if self.held else 0.0
        self.held.appendleft(v.detach().mean(0))
        return v + before


@CASES("a full deque(maxlen=3) of numbers is read by index and len", passes(3))
class RecentNumbers(Keeping):
    def __init__(self) -> None:
        super().__init__(deque([1.0, 2.0, 3.0], maxlen=3))

    def middle(self, x: Tensor) -> Tensor:
        self.held.append(self.held[0] + x.shape[2])
        return x * self.held[0] + len(self.held) + sum(self.held)


class _Doubling(list):  # type: ignore[type-arg]
    def append(self, value: Any) -> None:
        super().append(2 * value)


@CASES("a list that overrides append", passes(2))
class OwnList(Keeping):
    def __init__(self) -> None:
        super().__init__(_Doubling())

    def middle(self, x: Tensor) -> Tensor:
        self.held.append(3)
        return x * self.held[-1]


class _OfTwo(OrderedDict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > 2:
            self.popitem(last=False)


@CASES("an OrderedDict that drops its oldest entry", passes(4))
class OwnDict(Keeping):
    def __init__(self) -> None:
        super().__init__(_OfTwo())
        self.count = 0

    def middle(self, x: Tensor) -> Tensor:
        self.count += 1
        self.held[self.count] = x.shape[2] * self.count
        return x * sum(self.held.values())


# --- numbers and comparisons of their own ------------------------------------------------------------


class _Five(int):
    def __rmul__(self, other: Any) -> Any:
        return other * 5


@CASES("a number of a class of its own: int with __rmul__", passes(2))
class OwnNumber(Keeping):
    def __init__(self) -> None:
        super().__init__(_Five(3))

    def middle(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.held.__rmul__(x) + self.held * x
        return scaled


class _Like:
    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return other == self.number

    __hash__ = None  # type: ignore[assignment]


@CASES("a number is looked for among objects that compare themselves", passes(2))
class Comparing(Keeping):
    def __init__(self) -> None:
        super().__init__([_Like(2), _Like(3)])

    def middle(self, x: Tensor) -> Tensor:
        return x * (2 if 3 in self.held else 5)


# --- generators and iterators ------------------------------------------------------------------------


class Numbers(Keeping):
    """Has a generator that counts how often it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = 0

    def numbers(self) -> Iterator[float]:
        """Three numbers."""
        try:
            yield from (2.0, 3.0, 4.0)
        finally:
            self.ended += 1


@CASES("a generator with finally is left by break", passes(2))
class LeftByBreak(Numbers):
    def middle(self, x: Tensor) -> Tensor:
        for number in self.numbers():
            x = x * number
            if number == 3.0:
                break
        return x + self.ended


@CASES("a generator with finally is dropped after its first number", passes(2))
class Dropped(Numbers):
    def middle(self, x: Tensor) -> Tensor:
        return x * next(self.numbers()) * self.ended


@CASES("a generator with finally is closed, and one runs to its end", passes(2))
class Closed(Numbers):
    def middle(self, x: Tensor) -> Tensor:
        numbers = self.numbers()
        x = x * next(numbers)
        numbers.close()  # type: ignore[attr-defined]
        return x * sum(self.numbers()) * self.ended


@CASES("a generator made in forward is kept, and goes on in the next pass", passes(3))
class KeptGenerator(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def middle(self, x: Tensor) -> Tensor:
        if self.held is None:
            self.held = (self.factor * number for number in range(1, 9))
        self.factor += 1
        return x * next(self.held)


@CASES("itertools.cycle over numbers, and count", passes(4))
class Cycled(Keeping):
    def __init__(self) -> None:
        super().__init__(itertools.cycle((2.0, 3.0, 5.0)))
        self.count = itertools.count(1)

    def middle(self, x: Tensor) -> Tensor:
        return x * next(self.held) + next(self.count)


# --- objects that forward makes ------------------------------------------------------------------------


def _counted(method: Any) -> Any:
    """Count the calls of a method in a list that only the wrapper knows, and multiply by a number there."""
    calls: list[int] = []
    factor = 2.0

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return method(*args, **kwargs) * factor

    def set_factor(value: float) -> None:
        nonlocal factor
        factor = value

    call.calls, call.set_factor = calls, set_factor  # type: ignore[attr-defined]
    return call


def _helper_class() -> Any:
    class Helper:
        @_counted
        def scaled(self, x: Tensor) -> Tensor:
            return x

        def noted(self, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
            seen.append(1)
            return x * len(seen)

        def doubled(self, x: Tensor) -> Tensor:
            return 2 * x

    return Helper


class MakesHelper(Keeping):
    """Makes an object in each forward pass, and calls one of its methods."""

    def __init__(self, method: str) -> None:
        super().__init__(_helper_class())
        self.method = method

    def middle(self, x: Tensor) -> Tensor:
        made: Tensor = getattr(self.held(), self.method)(x)
        return made


def _with_calls() -> tuple[MakesHelper, Any]:
    net = MakesHelper("scaled")
    return net, net.held.scaled.calls


def _with_defaults() -> tuple[MakesHelper, Any]:
    net = MakesHelper("noted")
    return net, net.held.noted.__defaults__


CASES.add("a decorated method of an object made in forward counts its calls", _with_calls, passes(2))
CASES.add("a default argument of a method of an object made in forward", _with_defaults, passes(2))
CASES.add(
    "a number in the closure of a method of an object made in forward changes",
    lambda: MakesHelper("scaled"),
    between(lambda net: net.held.scaled.set_factor(3.0)),
)
CASES.add(
    "a method of the class of an object made in forward is replaced",
    lambda: MakesHelper("doubled"),
    between(lambda net: setattr(net.held, "doubled", lambda self, x: 3 * x)),
)


# --- errors ------------------------------------------------------------------------------------------


class _Named(ValueError):
    def __str__(self) -> str:
        return "a name of its own"


@CASES("the texts of errors are kept", passes(2))
class Texts(Keeping):
    def __init__(self) -> None:
        super().__init__([])

    def middle(self, x: Tensor) -> Tensor:
        for error in (KeyError("a"), _Named(1), OSError(2, "gone"), ValueError(1, "b"), ValueError()):
            try:
                raise error
            except Exception as raised:
                self.held.append(f"{type(raised).__name__}: {raised}")
        return x * len("".join(self.held))


# --- tensors in odd places ---------------------------------------------------------------------------


@dataclass
class Kept:
    """A vector and how often it was set."""

    vector: Tensor | None = None
    count: int = 0


@CASES("features in a dataclass on self, read in the next pass", passes(3))
class InDataclass(Keeping):
    def __init__(self) -> None:
        super().__init__(Kept())

    def late(self, v: Tensor) -> Tensor:
        before = self.held.vector
        self.held.vector = v.detach().mean(0)
        self.held.count += 1
        return v if before is None else v + before * self.held.count


@CASES("features in a tuple of a list and a dict, read in the next pass", passes(3))
class InTuple(Keeping):
    def __init__(self) -> None:
        super().__init__(([], {}))

    def late(self, v: Tensor) -> Tensor:
        before = self.held[1].get("last", 0.0)
        self.held[0].append(v.detach().sum(0))
        self.held[1]["last"] = v.detach().mean(0)
        return v + before


@CASES("features in the keywords of a partial", expected=SAME_OR_REFUSED)
class InPartial(Keeping):
    def __init__(self) -> None:
        super().__init__(functools.partial(torch.add, alpha=1))

    def late(self, v: Tensor) -> Tensor:
        self.held.keywords["other"] = v.detach().mean(0)
        added: Tensor = self.held(v)
        return added
