"""The base of stores that keep a map whole in one tensor, and track which of it was written."""

from __future__ import annotations

from threading import Lock

from torch import Tensor

from streamcnn.geometry.regions import Region
from streamcnn.geometry.windows import crop
from streamcnn.stores.base import Store, StoreSpec
from streamcnn.stores.frontier import Frontier


class WholeStore(Store):
    """A map in one tensor, which is allocated at the first write in the layout of that tile.

    Parameters
    ----------
    spec
        The map.
    zeroed
        Whether the tensor is allocated zeroed. Otherwise a part that is read before it was written is zeroed
        then.
    """

    def __init__(self, spec: StoreSpec, *, zeroed: bool) -> None:
        super().__init__(spec)
        self._zeroed = zeroed
        self._map: Tensor | None = None
        self._lock = Lock()
        """Guards the allocation and the frontier."""
        self._frontier = Frontier(spec.size)

    def _claim(self, whole: Tensor, region: Region) -> list[tuple[Region, bool]]:
        """Split ``region`` by whether something was written there, and count all of it as written."""
        zero = None if self._zeroed else lambda part: self._view(whole, part).zero_()
        with self._lock:
            return self._frontier.claim(region, zero)

    def _readable(self, whole: Tensor, region: Region) -> Tensor:
        """A view of a region, with zeros where nothing was written."""
        if not self._zeroed:
            for part, holds in self._claim(whole, region):
                if not holds:
                    self._view(whole, part).zero_()
        return self._view(whole, region)

    def _view(self, whole: Tensor, region: Region) -> Tensor:
        return crop(whole, self.spec.axes, self._whole, region)
