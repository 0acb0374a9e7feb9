"""The machines that plans are made for: this one, or a CUDA card that need not be present."""

from __future__ import annotations

import torch
from torch import nn

from streamcnn.ceiling.device import reserved_bytes
from streamcnn.ceiling.rooms import buffered_file_bytes, host_offload_bytes
from streamcnn.plan.hardware import NOMINAL
from streamcnn.plan.storage import Tier
from streamcnn.planning.backends import Backend, CpuBackend, CudaBackend
from streamcnn.planning.spec import Machine, OffloadTier
from streamcnn.runtime.calibration import hardware_profile
from streamcnn.runtime.rates import keeps_blocks
from streamcnn.support.processes import processes_here

CONTEXT_BYTES = 960 * 2**20
"""Bytes that CUDA, its libraries and the margin take of a card that is not present. On an H100 with PyTorch
2.11 they took 765 to 780 MiB; the margin is 128 MiB, and the sum is rounded up to a multiple of 64 MiB."""
_MEASURED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Element types in which convolutions are timed; others are assumed to be as fast as the first."""


def this_machine(device: torch.device, dtype: torch.dtype = torch.float32) -> Machine:
    """This machine, computing on ``device`` in ``dtype``; its rates are measured if they are not known."""
    offload_tiers: tuple[OffloadTier, ...] = (OffloadTier(Tier.DISK, buffered=_share(buffered_file_bytes())),)
    if device.type == "cuda":
        # Maps go to the disk only when maps have taken the RAM that would buffer files.
        host = OffloadTier(Tier.HOST, _share(host_offload_bytes()))
        offload_tiers = (host, OffloadTier(Tier.DISK))
    hardware = hardware_profile(device, dtype if dtype in _MEASURED else _MEASURED[0])
    return Machine(hardware, offload_tiers, reserved_bytes(device), backend_of(device))


def _share(nbytes: int) -> int:
    """This process's share of the host's RAM, split evenly among the processes that work together here."""
    return nbytes // processes_here()


def backend_of(device: torch.device) -> Backend:
    """The backend of ``device``; the host's if it has none of its own."""
    if device.type == "cuda":
        return CudaBackend()
    return CpuBackend.on(torch.get_num_threads(), keeps_blocks=keeps_blocks(device))


def cuda_card(net: nn.Module, *, host_bytes: int, optimizer_copies: int) -> Machine:
    """A CUDA card that need not be present, with nominal rates.

    Parameters
    ----------
    host_bytes
        Bytes of host RAM to which maps may be offloaded; further maps go to the disk.
    optimizer_copies
        Numbers that the optimiser keeps for each parameter: 2 for Adam, 1 for momentum, 0 for plain SGD.
    """
    parameters = sum(p.nbytes for p in net.parameters())
    buffers = sum(b.nbytes for b in net.buffers())
    return Machine(
        hardware=NOMINAL["cuda"],
        offload_tiers=(OffloadTier(Tier.HOST, host_bytes), OffloadTier(Tier.DISK)),
        reserved=CONTEXT_BYTES + (1 + optimizer_copies) * parameters + buffers,
        backend=CudaBackend(),
    )
