"""Stores, which hold checkpoints and gradient maps between phases."""

from streamcnn.stores.base import Store as Store
from streamcnn.stores.base import StoreSpec as StoreSpec
from streamcnn.stores.cuda_copies import transfers_of as transfers_of
from streamcnn.stores.host import HostStore as HostStore
from streamcnn.stores.memory import MemoryStore as MemoryStore
from streamcnn.stores.pinned import SparePinned as SparePinned
from streamcnn.stores.spare_files import SpareFiles as SpareFiles
from streamcnn.stores.spill import SpillFolder as SpillFolder
from streamcnn.stores.spill import free_bytes as free_bytes
from streamcnn.stores.spill import remove_abandoned as remove_abandoned
from streamcnn.stores.spill import spill_place as spill_place
from streamcnn.stores.transfers import Deferred as Deferred
from streamcnn.stores.transfers import GpuTransfers as GpuTransfers
from streamcnn.stores.transfers import Incoming as Incoming
from streamcnn.stores.transfers import PlainTransfers as PlainTransfers
from streamcnn.stores.transfers import Transfers as Transfers
from streamcnn.stores.zarr import ZarrStore as ZarrStore
