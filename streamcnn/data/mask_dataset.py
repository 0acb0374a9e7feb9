"""Images with masks of their pixels' classes, from a table or from two folders.

The head of every image and mask is read when the data set is opened, so that no training fails at a bad one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import final

from torch.utils.data import Dataset

from streamcnn.data.augmentation import AugmentedSource, RandomAugmentation
from streamcnn.data.copies import check_copies, same_files
from streamcnn.data.csv_columns import read_cells, require_filled, require_said
from streamcnn.data.dataset import OF_CONTENT, digest_of, no_split, will_need
from streamcnn.data.fingerprints import content_digest
from streamcnn.data.image_files import FoundImage, find_images
from streamcnn.data.labelled_files import UNSPLIT, distinct_scans, path_in_table, require_data
from streamcnn.data.mask_values import values_of_file
from streamcnn.data.scans import scan_of
from streamcnn.data.sources import DEFAULT_CHOICE, ImageChoice, ImageSource, is_image, open_chosen, open_image
from streamcnn.data.sources.files import is_there
from streamcnn.data.sources.guard import MissingChunks
from streamcnn.data.sources.places import local_path
from streamcnn.data.splits import canonical, split_of_folder
from streamcnn.data.uniform import check_alike, kind_of_file, size_of_file
from streamcnn.data.wrapping import is_integer
from streamcnn.errors import DatasetMismatch, some

_READERS = 8
"""Number of files read at a time for fingerprints."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """An image and its mask."""

    name: str
    image: Path
    mask: Path
    split: str
    others: tuple[tuple[Path, ...], tuple[Path, ...]]
    """Further files of the image and of the mask, which may consist of several."""

    def identity(self) -> str:
        """Identifies the pair: its name, and the content of its files."""
        files = zip((self.image, self.mask), self.others, strict=True)
        return " ".join((self.name, *(content_digest([path, *further]) for path, further in files)))


@final
class MaskDataset(Dataset[tuple[ImageSource, ImageSource]]):
    """Images with their masks as sources ``(image, mask)``; no pixel is read before the model asks.

    Parameters
    ----------
    path
        A CSV file with the columns ``image`` and ``mask`` (paths, taken from the table's folder if they are
        relative) and, if wanted, ``split``; or a folder of images.
    masks
        If that is a folder: the one with a mask for each image, at the same path but for its ending.
    split
        Which images; None takes all. A row of the table says it, or the topmost folder of each image, if all
        of these are called like splits; else it is ``train``.
    positions
        Of the images to take among those; None takes all.
    augmentation, seed
        As for ``TileDataset``: images are mirrored and turned with their masks, whose values stay.
    choice
        Which image of each file, in which resolution, and where its channels are. Masks are read as they are.
    empty_masks
        Whether a mask in zarr may lack all its chunks, and then holds its fill value alone, as zarr writes a
        mask of background by default. A mask whose chunks were lost cannot be told from that.

    Raises
    ------
    DatasetMismatch
        If there are no such images, an image has no mask, or a mask has another size than its image, or
        several channels, or no integers; if images differ in channels or dtypes, or one occurs in two
        splits or two rows; or if only some images are in folders of splits.
    CorruptImage
        If a file cannot be opened, or a folder holds no image.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        masks: str | Path | None = None,
        split: str | None = None,
        positions: Sequence[int] | None = None,
        augmentation: RandomAugmentation | None = None,
        seed: int = 0,
        choice: ImageChoice = DEFAULT_CHOICE,
        empty_masks: bool = False,
    ) -> None:
        self.path = local_path(path)
        require_data(self.path, "CSV files and folders of images")
        self.choice = choice
        self._missing_chunks: MissingChunks = "fill" if empty_masks else "some"
        every = _pairs(self.path, None if masks is None else local_path(masks), choice)
        names, splits = [pair.name for pair in every], [pair.split for pair in every]
        check_alike(self.path, names, [kind_of_file(pair.image, choice) for pair in every])
        check_copies(self.path, names, splits, same_files([(pair.image, *pair.others[0]) for pair in every]))
        for pair in every:
            _check_mask(open_chosen(pair.image, choice), self._open_mask(pair))
        wanted = None if split is None else canonical(split)
        pairs = [pair for pair in every if wanted is None or pair.split == wanted]
        if not pairs:
            raise no_split(self.path, split, splits)
        self._pairs = pairs if positions is None else [pairs[position] for position in positions]
        self.names = tuple(pair.name for pair in self._pairs)
        self.augmentation = augmentation
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of another epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, position: int) -> tuple[ImageSource, ImageSource]:
        pair = self._pairs[position]
        image, mask = open_chosen(pair.image, self.choice), self._open_mask(pair)
        if self.augmentation is None:
            return image, mask
        drawn = self.augmentation.draw(seed=self._seed, epoch=self._epoch, index=position)
        return AugmentedSource(image, drawn), AugmentedSource(mask, replace(drawn, invert=False, gain=1.0))

    def size_of(self, position: int) -> tuple[int, int]:
        """Height and width of an image as it is stored."""
        return size_of_file(self._pairs[position].image, self.choice)

    def _open_mask(self, pair: _Pair) -> ImageSource:
        return open_image(pair.mask, missing_chunks=self._missing_chunks)

    @property
    def fingerprint(self) -> str:
        """Identifies these images, their masks and their augmentations: a text with a SHA-256.

        Raises
        ------
        CorruptImage
            If a file cannot be read.
        """
        return f"{OF_CONTENT}{digest_of(self._identities(), self.augmentation, self._seed)}"

    def _identities(self) -> Iterator[str]:
        # In parallel: a disk or a file server answers several requests sooner than one by one.
        with ThreadPoolExecutor(_READERS, thread_name_prefix="streamcnn-content") as readers:
            for identity in readers.map(_Pair.identity, self._pairs):
                yield f"{identity} {dict(self.choice.made)}"

    def prefetch(self, position: int) -> None:
        """Let the kernel read image and mask into its page cache; images that are folders are skipped."""
        pair = self._pairs[position]
        for path in (pair.image, pair.mask):
            if path.is_file():
                will_need(path)

    def mask_values(self, position: int) -> Mapping[int, int]:
        """Count the pixels of each value in a mask, all of which is read.

        Raises
        ------
        CorruptImage
            If the mask cannot be read.
        """
        return values_of_file(self._pairs[position].mask, self._missing_chunks)

    def mask_name(self, position: int) -> str:
        """The path of a mask."""
        return str(self._pairs[position].mask)


def _pairs(path: Path, masks: Path | None, choice: ImageChoice) -> list[_Pair]:
    """All images of a table or a folder, with their masks."""
    if not path.is_dir():
        if masks is not None:
            raise DatasetMismatch(f"{path} is a table, whose column mask names the masks: leave masks= out")
        return _of_table(path)
    if masks is None:
        raise DatasetMismatch(f"{path} is a folder of images: give the folder of their masks as masks=")
    known: dict[str, FoundImage] = {}
    for found in find_images([masks]):
        other = known.setdefault(_without_ending(found.relative), found)
        if other is not found:
            raise DatasetMismatch(f"{other.path} and {found.path} are masks of one image: keep one of them")
    images = find_images([path], choice.series)
    lacking = [each.relative for each in images if _without_ending(each.relative) not in known]
    if lacking:
        raise DatasetMismatch(
            f"{masks} has no masks for {some(lacking)} of {path}: give each the path of its image, but for "
            "its ending"
        )
    pairs = []
    for image, split in zip(images, _splits(path, [each.relative for each in images]), strict=True):
        mask = known[_without_ending(image.relative)]
        pairs.append(_Pair(image.relative, image.path, mask.path, split, (image.others, mask.others)))
    return pairs


def _splits(folder: Path, relatives: Sequence[str]) -> list[str]:
    """The split of each image by its topmost folder."""
    tops = [PurePosixPath(relative).parts[:-1][:1] for relative in relatives]
    found = [split_of_folder(top[0]) if top else None for top in tops]
    outside = [relative for relative, split in zip(relatives, found, strict=True) if split is None]
    if outside and len(outside) < len(found):
        raise DatasetMismatch(
            f"{folder} has folders called like splits, and {some(outside)} outside of them: allowed are "
            "images of which all lie in folders such as train, val and test, or none; move some, or name "
            "images, masks and splits in a CSV file"
        )
    return [split or UNSPLIT for split in found]


def _without_ending(relative: str) -> str:
    return str(PurePosixPath(relative).with_suffix("")).removesuffix(".ome")


def _of_table(path: Path) -> list[_Pair]:
    rows = []
    for line, cells in read_cells(path, ("image", "mask"), ("split",), ()):
        where = f"{path}, line {line}"
        require_filled(where, cells, ("image", "mask"))
        require_said(where, cells, ("split",))
        rows.append((line, cells))
    if not rows:
        raise DatasetMismatch(f"{path} has no rows: give one for each image")
    files = [
        tuple(_file_in_table(path, cells[each], line) for each in ("image", "mask")) for line, cells in rows
    ]
    images = distinct_scans(
        path, [(line, cells["image"]) for line, cells in rows], [image for image, _ in files]
    )
    return [
        _Pair(
            cells["image"],
            image,
            mask,
            canonical(cells.get("split") or UNSPLIT),
            (scan.files_beside(image), scan_of(mask).files_beside(mask)),
        )
        for (_, cells), (image, mask), scan in zip(rows, files, images, strict=True)
    ]


def _file_in_table(table: Path, text: str, line: int) -> Path:
    """The path of an image or a mask that a line of a table names.

    Raises
    ------
    DatasetMismatch
        If there is no such file.
    """
    file = path_in_table(table, text, line)
    if not is_there(file) or not is_image(file):
        raise DatasetMismatch(
            f"{table}, line {line} names {file}, where there is no image: give paths from the table's folder"
        )
    return file


def _check_mask(image: ImageSource, mask: ImageSource) -> None:
    """Make sure that a mask fits its image.

    Raises
    ------
    DatasetMismatch
        If it does not; the text names both.
    """
    found = f"mask {mask.name} of {image.name}"
    if mask.shape[1:] != image.shape[1:]:
        (height, width), (rows, cols) = mask.shape[1:], image.shape[1:]
        raise DatasetMismatch(
            f"{found} has {height} x {width} pixels, and the image {rows} x {cols}: allowed is a mask of the "
            "image's size"
        )
    if mask.shape[0] != 1:
        raise DatasetMismatch(
            f"{found} has {mask.shape[0]} channels: allowed is one, which holds the number of each pixel's "
            "class; of a picture with a palette, write its numbers as grey"
        )
    if not is_integer(mask.dtype):
        raise DatasetMismatch(f"{found} holds {mask.dtype}: allowed are integers, the numbers of classes")
