"""Pictures that lie on their side in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from source_contract import assert_reads, channels_last, pixels, region

from streamcnn.data.sources import PictureSource


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_pixels_are_turned_upright(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(channels_last(pixels())).save(path, exif=exif)
    with Image.open(path) as picture:
        expected = np.moveaxis(np.array(ImageOps.exif_transpose(picture)), -1, 0)
    source = PictureSource(path)
    assert source.shape == expected.shape
    assert_reads(source, expected, region(3, 40, 7, 50))
