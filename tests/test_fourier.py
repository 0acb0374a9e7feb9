"""Fourier transforms along rows, columns and channels: FNet, global filters, fast Fourier convolution."""

from __future__ import annotations

import torch
from operator_cases import SHAPE, TILE, Function, after_convolution, assert_streams, by_name
from torch import Tensor
from torch.fft import fft, fft2, fftn, fftshift, hfft, ifft2, ifftshift, ihfft, irfft2, irfftn, rfft2, rfftn
from torch.nn import functional as F

from streamcnn import StreamingModel


def fourier_unit(x: Tensor) -> Tensor:
    """Of fast Fourier convolution (LaMa): parts of the spectrum as channels."""
    n, _, h, w = x.shape
    spectrum = rfftn(x, dim=(-2, -1), norm="ortho")
    channels = torch.stack((spectrum.real, spectrum.imag), -1).permute(0, 1, 4, 2, 3).contiguous()
    channels = channels.view(n, -1, *spectrum.shape[-2:])
    channels = F.relu(F.batch_norm(channels, None, None, training=True))
    parts = channels.view(n, -1, 2, *spectrum.shape[-2:]).permute(0, 1, 3, 4, 2).contiguous()
    return irfftn(torch.complex(parts[..., 0], parts[..., 1]), s=(h, w), dim=(-2, -1), norm="ortho")


def global_filter(x: Tensor) -> Tensor:
    """A weight for each frequency of tokens (GFNet)."""
    n, c, h, w = x.shape
    spectrum = rfft2(x.flatten(2).transpose(1, 2).view(n, h, w, c), dim=(1, 2), norm="ortho")
    weights = torch.linspace(-1, 1, 2 * spectrum[0].numel()).view(*spectrum.shape[1:], 2).to(x)
    filtered = irfft2(spectrum * torch.view_as_complex(weights), s=(h, w), dim=(1, 2), norm="ortho")
    return filtered.reshape(n, h * w, c).transpose(1, 2).reshape(x.shape)


def low_frequencies(x: Tensor) -> Tensor:
    """Weights for the low frequencies, the others 0 (FNO)."""
    spectrum = rfft2(x)
    found = torch.zeros_like(spectrum)
    found[:, :, :3, :4] = 2 * spectrum[:, :, :3, :4]
    found[:, :, -3:, :4] = 3 * spectrum[:, :, -3:, :4]
    return irfft2(found, s=x.shape[-2:])


def amplitude_and_phase(x: Tensor) -> Tensor:
    spectrum = fft2(x)
    return ifft2(torch.polar(spectrum.abs().sqrt(), spectrum.angle())).real


CASES: dict[str, Function] = {
    "fast Fourier convolution": fourier_unit,
    "global filter": global_filter,
    "low frequencies": low_frequencies,
    "amplitude and phase": amplitude_and_phase,
    "other sizes": lambda x: irfft2(rfft2(x, s=(24, 29)), s=(19, -1)).sin(),
    "frequency 0 in the middle": lambda x: ifftshift(fftshift(fft2(x), (2, 3))[:, :, 1:], 3).abs().sin(),
    "channels and rows": lambda x: fftn(x, dim=(1, 3)).real.sin() + fft(x, dim=1).imag,
    "the last two of channels last": lambda x: fftn(x.permute(0, 2, 3, 1), s=(11, 5)).real.sin(),
    "images, too": lambda x: fftn(x, norm="forward").real.sin(),
    "symmetric": lambda x: hfft(ihfft(x, dim=2), n=x.shape[2], dim=2).sin(),
    "channels of tokens": lambda x: fft(x.flatten(2).transpose(1, 2)).real.sin(),
}


@by_name(CASES)
def test_transform(case: Function) -> None:
    assert_streams(case, resident=False)
    assert_streams(case, (1, 3, 14, 23), tile=(40, 5), one_tile=True, resident=False)


def test_a_transform_of_all_tokens_as_one_line_is_whole() -> None:
    net = after_convolution(lambda x: fft(x.flatten(2)).real)
    (resident,) = StreamingModel(net, tile=TILE).plan(SHAPE).residents
    assert "it works along merged axes of space" in resident
