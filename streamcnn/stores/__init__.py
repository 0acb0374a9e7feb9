"""Where checkpoints and gradient maps live between phases."""

from streamcnn.stores.base import Store as Store
from streamcnn.stores.base import StoreSpec as StoreSpec
from streamcnn.stores.memory import MemoryStore as MemoryStore
from streamcnn.stores.spare_files import SpareFiles as SpareFiles
from streamcnn.stores.spill import SpillFolder as SpillFolder
from streamcnn.stores.spill import free_bytes as free_bytes
from streamcnn.stores.spill import remove_abandoned as remove_abandoned
from streamcnn.stores.zarr import ZarrStore as ZarrStore
