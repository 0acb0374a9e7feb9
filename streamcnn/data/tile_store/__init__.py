"""A folder of images as sharded, compressed zarr arrays, with labels and checksums.

``format.py`` defines the layout and the manifest, ``arrays.py`` writes one image, ``checks.py`` compares
bytes on disk with the manifest, and ``writer.py`` and ``reader.py`` are the interfaces for other packages.
"""

from streamcnn.data.tile_store.format import Head as Head
from streamcnn.data.tile_store.format import ImageRecord as ImageRecord
from streamcnn.data.tile_store.format import is_tile_store as is_tile_store
from streamcnn.data.tile_store.reader import TileStore as TileStore
from streamcnn.data.tile_store.writer import TileStoreWriter as TileStoreWriter
from streamcnn.data.tile_store.writer import check_names as check_names
from streamcnn.data.tile_store.writer import write_image_folder as write_image_folder
