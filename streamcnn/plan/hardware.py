"""Hardware profiles: how fast a machine computes and moves bytes. Projected times follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamcnn.plan.storage import Tier


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """Rates of one device with its stores, all per second."""

    source: str
    """Where the figures come from: "nominal", or the device they were measured on."""
    dense_flops: float
    """Floating-point operations of dense convolutions and matrix products."""
    grouped_flops: float
    """The same for depthwise convolutions, where every channel is convolved by itself."""
    memory_bytes: float
    """Bytes that pointwise operators read and write."""
    fresh_bytes: float
    """Bytes of new memory that the operating system hands out, each page zeroed first."""
    operator_seconds: float
    """Fixed cost of running one operator on a tile, in seconds."""
    read_bytes: Mapping[Tier, float]
    """Bytes read from a store."""
    write_bytes: Mapping[Tier, float]
    """Bytes written to a store; of the disk tier, bytes that have reached the disk."""
    buffered_write_bytes: float
    """Bytes written to a store on disk while the system buffers them in RAM."""
    transfer_seconds: Mapping[Tier, float]
    """Fixed cost of reading or writing one region of a store, in seconds."""

    def __hash__(self) -> int:
        # Equal profiles have equal figures; mappings themselves have no hash.
        return hash((self.source, self.dense_flops, self.memory_bytes, self.operator_seconds))


NOMINAL = {
    "cpu": HardwareProfile(
        source="nominal",
        dense_flops=1e11,
        grouped_flops=1e10,
        memory_bytes=8e9,
        fresh_bytes=1.5e9,
        operator_seconds=1e-4,
        read_bytes={Tier.MEMORY: 8e9, Tier.HOST: 8e9, Tier.DISK: 1e9},
        write_bytes={Tier.MEMORY: 5e9, Tier.HOST: 5e9, Tier.DISK: 5e8},
        buffered_write_bytes=5e8,
        transfer_seconds={Tier.MEMORY: 4e-5, Tier.HOST: 4e-5, Tier.DISK: 2e-4},
    ),
    "cuda": HardwareProfile(
        source="nominal",
        dense_flops=1e13,
        grouped_flops=1e12,
        memory_bytes=4e11,
        fresh_bytes=1e13,
        operator_seconds=2e-5,
        read_bytes={Tier.MEMORY: 4e11, Tier.HOST: 1.2e10, Tier.DISK: 1e9},
        write_bytes={Tier.MEMORY: 4e11, Tier.HOST: 1.2e10, Tier.DISK: 5e8},
        buffered_write_bytes=5e8,
        transfer_seconds={Tier.MEMORY: 4e-5, Tier.HOST: 1e-4, Tier.DISK: 3e-4},
    ),
}
"""Round figures by device type, for machines not measured: a CPU with two cores, a GPU of 2018."""
