"""Images with masks, from tables and from folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from torch import Tensor

from streamcnn.data import mask_values
from streamcnn.data.augmentation import RandomAugmentation
from streamcnn.data.mask_dataset import MaskDataset
from streamcnn.data.sources import ImageSource
from streamcnn.errors import CorruptImage, DatasetMismatch
from streamcnn.geometry.regions import Region
from streamcnn.training.batch_sizes import require_one_size, require_one_size_in_order

SIZE = (12, 17)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")


def an_image(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)


def a_mask(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The red of the image above 128."""
    return (an_image(seed, size)[..., 0] > 128).astype(np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a.1", "a.2", "far/b")):
        write(tmp_path / "images" / f"{name}.tif", an_image(seed))
        write(tmp_path / "masks" / f"{name}.tiff", a_mask(seed))
    return tmp_path


def table(folder: Path, *rows: str, header: str = "image,mask,split") -> Path:
    path = folder / "scenes.csv"
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def read(source: ImageSource) -> Tensor:
    return source.read(Region.whole(source.shape[1:]))


def test_images_of_a_batch_have_one_size(folders: Path) -> None:
    turned = MaskDataset(
        folders / "images", masks=folders / "masks", augmentation=RandomAugmentation(turns=True)
    )
    require_one_size(turned, 1, advice="")
    with pytest.raises(DatasetMismatch, match=r"a\.1\.tif is not square, of 12 x 17 pixels now"):
        require_one_size(turned, 2, advice="take fewer")
    write(folders / "images" / "far" / "b.tif", an_image(2, (13, 17)))
    write(folders / "masks" / "far" / "b.tiff", a_mask(2, (13, 17)))
    images = MaskDataset(folders / "images", masks=folders / "masks")
    require_one_size_in_order(images, 2, advice="")
    for check, size in ((require_one_size, 2), (require_one_size_in_order, 3)):
        with pytest.raises(
            DatasetMismatch, match=r"image 2 \(.*b\.tif\) has 13 x 17 .* so take fewer, or write"
        ):
            check(images, size, advice="take fewer")


def test_masks_lie_in_a_folder_at_the_paths_of_their_images(folders: Path) -> None:
    images = MaskDataset(folders / "images", masks=folders / "masks")
    assert images.names == ("a.1.tif", "a.2.tif", "far/b.tif")
    assert len(images) == 3
    for seed in range(3):
        image, mask = images[seed]
        assert torch.equal(read(image), torch.from_numpy(an_image(seed)).movedim(2, 0))
        assert torch.equal(read(mask)[0], torch.from_numpy(a_mask(seed)))


def test_a_table_names_images_masks_and_splits(folders: Path) -> None:
    rows = [
        "images/a.1.tif,masks/a.1.tiff,train",
        "images/a.2.tif,masks/a.2.tiff,Valid",
        "images/far/b.tif,masks/far/b.tiff,",
    ]
    path = table(folders, *rows)
    assert MaskDataset(path).names == ("images/a.1.tif", "images/a.2.tif", "images/far/b.tif")
    assert MaskDataset(path, split="train").names == ("images/a.1.tif", "images/far/b.tif")
    (validation,) = MaskDataset(path, split="val")
    assert torch.equal(read(validation[1])[0], torch.from_numpy(a_mask(1)))
    assert MaskDataset(path, split="train", positions=[1]).names == ("images/far/b.tif",)


def test_masks_are_turned_with_their_images_and_keep_their_values(folders: Path) -> None:
    augmentation = RandomAugmentation(mirrors=True, turns=True, inversion=1.0)
    images = MaskDataset(folders / "images", masks=folders / "masks", augmentation=augmentation, seed=1)
    seen = set()
    for epoch in range(6):
        images.set_epoch(epoch)
        image, mask = images[0]
        seen.add(str(read(mask)))
        # The image is inverted, its mask is not.
        assert torch.equal(read(mask)[0], (255 - read(image)[0].int() > 128).byte())
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("image", "mask", "text"),
    [
        (
            an_image(0),
            a_mask(0, (12, 16)),
            r"mask .*a\.tif of .*a\.tif has 12 x 16 pixels, and the image 12",
        ),
        (an_image(0), an_image(0), "has 3 channels: allowed is one.* of a picture with a palette, write"),
        (an_image(0), a_mask(0).astype(np.float32), r"holds torch\.float32: allowed are integers"),
    ],
)
def test_a_mask_that_is_none_of_its_image_is_named(
    tmp_path: Path, image: np.ndarray, mask: np.ndarray, text: str
) -> None:
    write(tmp_path / "images" / "a.tif", image)
    write(tmp_path / "masks" / "a.tif", mask)
    with pytest.raises(DatasetMismatch, match=text):
        MaskDataset(tmp_path / "images", masks=tmp_path / "masks")


def test_what_is_missing_is_named(folders: Path) -> None:
    with pytest.raises(DatasetMismatch, match="give the folder of their masks"):
        MaskDataset(folders / "images")
    (folders / "masks" / "a.2.tiff").unlink()
    with pytest.raises(DatasetMismatch, match=r"has no masks for 'a\.2\.tif' of"):
        MaskDataset(folders / "images", masks=folders / "masks")
    with pytest.raises(CorruptImage, match="nowhere"):
        MaskDataset(folders / "images", masks=folders / "nowhere")


def test_two_masks_of_one_image_are_refused(folders: Path) -> None:
    write(folders / "masks" / "a.1.tif", a_mask(0))
    with pytest.raises(DatasetMismatch, match="are masks of one image"):
        MaskDataset(folders / "images", masks=folders / "masks")


@pytest.mark.parametrize(
    ("rows", "header", "text"),
    [
        (["images/a.1.tif,"], "image,mask", "line 2: mask is blank"),
        (["images/a.1.tif,masks/no.tif"], "image,mask", r"line 2 names .*no\.tif, where there is no image"),
        ([], "image,mask", "has no rows"),
        (
            ["images/a.1.tif,x"],
            "image,label",
            "needed are image and mask.*; its column label is for the task classification",
        ),
    ],
)
def test_a_wrong_table_is_an_error_that_names_the_line(
    folders: Path, rows: list[str], header: str, text: str
) -> None:
    with pytest.raises(DatasetMismatch, match=text):
        MaskDataset(table(folders, *rows, header=header))


@pytest.mark.parametrize(
    ("second", "text"),
    [
        ("images/a.1.tif,masks/a.2.tiff,val", r"'images/a\.1\.tif' in several rows \(lines 2, 3\)"),
        ("images/../images/a.1.tif,masks/a.1.tiff,train", r"line 3: .* is the same image as line 2"),
        ("images/copy.tif,masks/a.1.tiff,val", r"'images/a\.1\.tif' in train and 'images/copy\.tif' in val"),
        ("images/a.2.tif,masks/a.2.tiff,nan", "line 3: split is 'nan', which stands for a missing one"),
    ],
    ids=["row", "path", "copy", "split"],
)
def test_an_image_is_in_one_row_and_one_split(folders: Path, second: str, text: str) -> None:
    size = (60, 60)  # smaller images are not compared
    write(folders / "images" / "a.1.tif", an_image(0, size))
    write(folders / "masks" / "a.1.tiff", a_mask(0, size))
    shutil.copy(folders / "images" / "a.1.tif", folders / "images" / "copy.tif")
    with pytest.raises(DatasetMismatch, match=text):
        MaskDataset(table(folders, "images/a.1.tif,masks/a.1.tiff,train", second))


def test_a_copy_in_the_same_split_is_told(folders: Path) -> None:
    write(folders / "images" / "c.tif", an_image(0, (60, 60)))
    write(folders / "masks" / "c.tiff", a_mask(0, (60, 60)))
    for folder, ending in (("images", "tif"), ("masks", "tiff")):
        shutil.copy(folders / folder / f"c.{ending}", folders / folder / f"d.{ending}")
    with pytest.warns(UserWarning, match=r"byte for byte: 'c\.tif' = 'd\.tif'"):
        assert len(MaskDataset(folders / "images", masks=folders / "masks")) == 5


def test_a_split_that_there_is_not_is_an_error(folders: Path) -> None:
    path = table(folders, "images/a.1.tif,masks/a.1.tiff,train")
    with pytest.raises(DatasetMismatch, match="no images of split 'test'"):
        MaskDataset(path, split="test")
    with pytest.raises(DatasetMismatch, match="leave masks= out"):
        MaskDataset(path, masks=folders / "masks")


def test_topmost_folders_that_are_called_so_are_splits(tmp_path: Path) -> None:
    for seed, name in enumerate(("Training/a", "Training/far/b", "valid/a")):
        write(tmp_path / "images" / f"{name}.tif", an_image(seed))
        write(tmp_path / "masks" / f"{name}.tif", a_mask(seed))
    images, masks = tmp_path / "images", tmp_path / "masks"
    assert MaskDataset(images, masks=masks, split="train").names == ("Training/a.tif", "Training/far/b.tif")
    assert MaskDataset(images, masks=masks, split="val").names == ("valid/a.tif",)
    assert len(MaskDataset(images, masks=masks)) == 3
    with pytest.raises(DatasetMismatch, match="no images of split 'test': it has"):
        MaskDataset(images, masks=masks, split="test")
    for kind, pixels in (("images", an_image(3)), ("masks", a_mask(3))):
        write(tmp_path / kind / "loose.tif", pixels)
    with pytest.raises(DatasetMismatch, match=r"called like splits, and 'loose\.tif' outside of them"):
        MaskDataset(images, masks=masks)


def test_images_without_folders_of_splits_are_there_to_train_on(folders: Path) -> None:
    assert len(MaskDataset(folders / "images", masks=folders / "masks", split="train")) == 3


def test_a_fingerprint_is_of_images_and_masks_wherever_they_lie(folders: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, **options: Any) -> str:
        return MaskDataset(folder / "images", masks=folder / "masks", **options).fingerprint

    before = fingerprint(folders)
    copy = tmp_path / "elsewhere"
    for kind in ("images", "masks"):
        shutil.copytree(folders / kind, copy / kind)
    assert fingerprint(copy) == before
    others = [
        fingerprint(copy, positions=[0, 1]),
        fingerprint(copy, augmentation=RandomAugmentation(turns=True)),
    ]
    write(copy / "masks" / "a.1.tiff", 1 - a_mask(0))
    others.append(fingerprint(copy))
    write(copy / "masks" / "a.1.tiff", a_mask(0))
    write(copy / "images" / "a.1.tif", an_image(9))
    others.append(fingerprint(copy))
    assert len({before, *others}) == 5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_the_values_of_a_mask_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type[np.integer[Any]]
) -> None:
    # Several parts, of which the last are cut.
    monkeypatch.setattr(mask_values, "_ROWS", 5)
    monkeypatch.setattr(mask_values, "_COLUMNS", 7)
    mask = np.random.default_rng(0).integers(4, size=SIZE).astype(dtype)
    mask[3, 4] = 200
    write(tmp_path / "images" / "a.tif", an_image(0))
    write(tmp_path / "masks" / "a.tif", mask)
    images = MaskDataset(tmp_path / "images", masks=tmp_path / "masks")
    values, counts = np.unique(mask, return_counts=True)
    assert dict(images.mask_values(0)) == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert images.mask_name(0) == str(tmp_path / "masks" / "a.tif")
