"""Image sources, which are read region by region; one module for each kind of storage."""

from __future__ import annotations

from streamcnn.data.sources.base import ImageSource as ImageSource
from streamcnn.data.sources.base import as_sources as as_sources
from streamcnn.data.sources.base import largest_of as largest_of
from streamcnn.data.sources.choice import DEFAULT_CHOICE as DEFAULT_CHOICE
from streamcnn.data.sources.choice import ImageChoice as ImageChoice
from streamcnn.data.sources.memory import ArraySource as ArraySource
from streamcnn.data.sources.memory import TensorSource as TensorSource
from streamcnn.data.sources.opening import is_image as is_image
from streamcnn.data.sources.opening import open_chosen as open_chosen
from streamcnn.data.sources.opening import open_image as open_image
from streamcnn.data.sources.picture import PictureSource as PictureSource
from streamcnn.data.sources.slide import SlideSource as SlideSource
from streamcnn.data.sources.tiff import TiffSource as TiffSource
from streamcnn.data.sources.zarr import ZarrSource as ZarrSource
from streamcnn.data.sources.zarr import write_zarr_image as write_zarr_image
