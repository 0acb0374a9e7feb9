"""A U-Net on five bands in uint16 and a mask, in zarr: exact, and within its budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.segmentation import CLASSES, compared, loss_of, make_net, scaled, write_scene
from streamcnn import StreamingModel
from streamcnn.data.sources import open_image
from streamcnn.geometry.regions import Region


def test_a_u_net_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    assert compared(tmp_path, 203, tile=96)["max_error"] < 1e-9


@pytest.mark.slow
def test_a_u_net_on_a_large_image_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    assert compared(tmp_path, 1000)["max_error"] < 1e-9


@pytest.mark.slow
def test_an_update_and_a_prediction_keep_to_their_budgets(tmp_path: Path) -> None:
    size, budget = 3000, 256 * 2**20
    image, mask = write_scene(tmp_path, size)
    model = StreamingModel(make_net(), budget, preprocess=scaled, spill=tmp_path)
    for run in (
        lambda: model.streamed_loss(image, mask, loss_of).backward(),
        lambda: model.predict_to(image, tmp_path / "map.zarr", output="classes"),
    ):
        run()
        report = model.last_report
        assert report is not None
        assert report.measured_bytes is not None
        assert 0 < report.measured_bytes <= budget < CLASSES * 4 * 2 * size**2
    found = open_image(tmp_path / "map.zarr")
    assert found.shape == (1, size, size)
    assert int(found.read(Region.whole((size, size))).max()) < CLASSES
