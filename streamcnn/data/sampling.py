"""Selection and order of images: division of a set, balanced subsets, a resumable sampler.

All depend on a seed and the labels alone, and are the same on any machine.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
from torch.utils.data import Sampler


def divide(
    labels: Sequence[Hashable], *, share: float = 0.1, seed: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide positions into training and validation, with the same shares of every label.

    Parameters
    ----------
    labels
        The labels of all images.
    share
        Share of the images for validation, as near as whole images of each label allow. A share above 0
        gives at least one image, of the commonest label, if that label has another.

    Raises
    ------
    ValueError
        If ``share`` is not between 0 and 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: allowed are 0 and more, and less than 1")
    validation: list[int] = []
    due = 0.0
    by_label = _by_label(labels)
    for label, positions in by_label.items():
        # Rounding remainders are carried on, so that labels with few images get their share in turn.
        due += share * len(positions)
        count = min(round(due), len(positions))
        due -= count
        validation += _shuffled(positions, _division_key(seed, label))[:count]
    if share > 0 and not validation:
        # All labels' shares round to zero, which would leave no image for validation.
        commonest = max(by_label, key=lambda label: len(by_label[label]), default=None)
        if len(by_label.get(commonest, ())) > 1:
            validation = _shuffled(by_label[commonest], _division_key(seed, commonest))[:1]
    chosen = set(validation)
    return tuple(p for p in range(len(labels)) if p not in chosen), tuple(sorted(chosen))


def balanced_subset(labels: Sequence[Hashable], num_per_label: int, *, seed: int = 0) -> tuple[int, ...]:
    """Positions of ``num_per_label`` images of each label.

    Raises
    ------
    ValueError
        If a label has fewer images.
    """
    chosen: list[int] = []
    for label, positions in _by_label(labels).items():
        if len(positions) < num_per_label:
            raise ValueError(
                f"label {label!r} has {len(positions)} images, {num_per_label} of each are asked for: "
                "take fewer, or make more images"
            )
        chosen += _shuffled(positions, f"subset {seed} {label!r}")[:num_per_label]
    return tuple(sorted(chosen))


class ResumableSampler(Sampler[int]):
    """Positions of images in an order that is drawn anew each epoch; it can be resumed anywhere.

    Iterating gives the rest of the present epoch, then begins the next. ``state_dict`` may be taken at any
    time; it counts the positions handed out. The worker processes of a ``DataLoader`` get positions long
    before their images are used, so only with ``num_workers=0`` are these the images used so far.

    Parameters
    ----------
    data
        Anything with a length.
    seed
        Seed of the orders.
    shuffle
        Whether to shuffle; False keeps the order of the data.
    labels
        If given, each epoch takes as many images of every label as the rarest label has.
    multiple
        An epoch has a multiple of this many images; the last ones of its order are left out.
    """

    def __init__(
        self,
        data: Sized,
        *,
        seed: int = 0,
        shuffle: bool = True,
        labels: Sequence[Hashable] | None = None,
        multiple: int = 1,
    ) -> None:
        if labels is not None and len(labels) != len(data):
            raise ValueError(f"{len(labels)} labels for {len(data)} images: allowed is one label each")
        self._length = len(data)
        self._seed = seed
        self._shuffle = shuffle
        self._labels = labels
        self._multiple = multiple
        self.epoch = 0
        self.position = 0
        self._drawn: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Number of images in a whole epoch."""
        return self._drawn_length() // self._multiple * self._multiple

    @property
    def num_left_out(self) -> int:
        """Number of images at the end of an epoch's order that are left out because of ``multiple``."""
        return self._drawn_length() - len(self)

    def _drawn_length(self) -> int:
        """Number of images in an epoch's order, including those that are left out."""
        if self._labels is None:
            return self._length
        groups = _by_label(self._labels)
        return min(map(len, groups.values()), default=0) * len(groups)

    def __iter__(self) -> Iterator[int]:
        while self.position < len(self._present()):
            self.position += 1
            yield self._present()[self.position - 1]
        self.epoch += 1
        self.position = 0

    def groups(self, size: int, announce: Callable[[int], None]) -> Iterator[list[int]]:
        """The rest of the present epoch, in groups of ``size`` positions; the last group may have fewer.

        When a group is handed out, the sampler's state is after it. Each position is announced as soon as the
        one before it is taken.
        """
        epoch, positions = self.epoch, list[int]()
        for position in self:
            positions.append(position)
            upcoming = self.upcoming()
            if upcoming is not None:
                announce(upcoming)
            if len(positions) == size or upcoming is None:
                yield positions
                positions = []
        assert self.epoch == epoch + 1

    def upcoming(self) -> int | None:
        """The next position in this epoch; None at its end."""
        present = self._present()
        return present[self.position] if self.position < len(present) else None

    def _present(self) -> list[int]:
        """The order of the present epoch."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = (self.epoch, self.order(self.epoch))
        return self._drawn[1]

    def order(self, epoch: int) -> list[int]:
        """The order of an epoch."""
        positions: Sequence[int] = range(self._length)
        if self._labels is not None:
            each = self._drawn_length() // max(1, len(_by_label(self._labels)))
            positions = balanced_subset(self._labels, each, seed=seed_of(f"epoch {self._seed} {epoch}"))
        order = _shuffled(positions, f"order {self._seed} {epoch}") if self._shuffle else list(positions)
        return order[: len(self)]

    def state_dict(self) -> dict[str, Any]:
        """The sampler's position, with its seed and length."""
        return {"length": self._length, "seed": self._seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from another sampler's state.

        Raises
        ------
        ValueError
            If that sampler had other data or another seed.
        """
        mine = self.state_dict()
        for key in ("length", "seed"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the saved sampler has {key} {state[key]}, this one {mine[key]}: resume with the data "
                    "and the seed that the run began with"
                )
        self.epoch, self.position = state["epoch"], state["position"]


def _by_label(labels: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Positions by label, with labels in order of first appearance."""
    positions: defaultdict[Hashable, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        positions[label].append(position)
    return positions


def _division_key(seed: int, label: Hashable) -> str:
    return f"divide {seed} {label!r}"


def _shuffled(positions: Sequence[int], key: str) -> list[int]:
    """``positions`` shuffled by ``key``, from raw words of a generator, which no version of it changes."""
    words = np.random.Philox(seed_of(key)).random_raw(max(1, len(positions)))
    return [positions[at] for at in np.argsort(words[: len(positions)], kind="stable")]


def seed_of(key: str) -> int:
    """A seed of 128 bits, derived from a text in the same way on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
