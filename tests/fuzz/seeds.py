"""Valid files of every kind that is read, a folder for each kind and variant."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tifffile
import torch
import zarr
from hostile import make_run, make_store
from numcodecs import BZ2, LZ4, LZMA, Blosc, GZip, Zstd
from PIL import Image
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from streamcnn.data.sources import write_zarr_image
from streamcnn.data.tile_store.format import JOURNAL, parse_head, parse_record, read_complete
from streamcnn.plan.hardware import NOMINAL

Make = Callable[[Path], None]
KEY = "a processor, 1 threads"

_PIXELS = np.random.default_rng(0).integers(0, 256, (3, 40, 30), np.uint8)
_LAST = np.ascontiguousarray(_PIXELS.transpose(1, 2, 0))


def _store(folder: Path) -> None:
    make_store(folder / "store")


def _unfinished_store(folder: Path) -> None:
    """A store as a killed writer leaves it: with a journal, and without the file that says it is complete."""
    store = make_store(folder / "store", levels=1)
    complete = read_complete(store)
    assert complete is not None
    manifest, _ = complete
    head, *records = manifest.read_bytes().splitlines()
    assert parse_head(head, manifest)
    assert all(parse_record(line, manifest) for line in records)
    (store / JOURNAL).write_bytes(manifest.read_bytes())
    (store / "complete.json").unlink()
    manifest.unlink()


def _zarr(version: int, **options: object) -> Make:
    def make(folder: Path) -> None:
        array = zarr.create_array(
            folder / "image.zarr",
            shape=_PIXELS.shape,
            dtype=np.uint16,
            chunks=(3, 16, 16) if "shards" not in options else (3, 8, 8),
            zarr_format=version,
            fill_value=0,
            **options,
        )
        array[:] = _PIXELS

    return make


def _ome_zarr(folder: Path) -> None:
    group = zarr.create_group(folder / "image.ome.zarr", zarr_format=3)
    for level in range(2):
        write_zarr_image(folder / "image.ome.zarr" / str(level), torch.from_numpy(_PIXELS[:, :: level + 1]))
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    datasets = [{"path": str(level)} for level in range(2)]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    zarr.consolidate_metadata(folder / "image.ome.zarr")


def _raw_ome_zarr(folder: Path) -> None:
    """An image as bioformats2raw writes it, in zarr's version 2."""
    root = zarr.create_group(folder / "image.zarr", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    (folder / "image.zarr" / "OME").mkdir()
    (folder / "image.zarr" / "OME" / "METADATA.ome.xml").write_text(
        '<OME><Image ID="Image:0" Name="scan"/><Image ID="Image:1" Name="label image"/></OME>'
    )
    for series in range(2):
        group = root.create_group(str(series))
        group.attrs["multiscales"] = [
            {"version": "0.4", "datasets": [{"path": "0"}], "axes": ["c", "y", "x"]}
        ]
        group.create_array("0", shape=_PIXELS.shape, dtype=np.uint8, chunks=(1, 20, 30))[:] = _PIXELS
    zarr.consolidate_metadata(folder / "image.zarr")


def _tiff(**options: object) -> Make:
    def make(folder: Path) -> None:
        tifffile.imwrite(folder / "image.tif", **{"data": _LAST, "photometric": "rgb", **options})

    return make


def _pyramid(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "image.tif", bigtiff=True) as writer:
        options = {"photometric": "rgb", "tile": (16, 16), "compression": "lzw", "predictor": True}
        writer.write(_LAST, subifds=1, **options)
        writer.write(_LAST[::2, ::2], subfiletype=1, **options)


def _two_file_ome(folder: Path) -> None:
    """An OME-TIFF whose second file holds the second channel."""
    where = '<TiffData FirstC="{c}" IFD="0"><UUID FileName="{name}">urn:uuid:{c}</UUID></TiffData>'
    names = "image.tif", "other.tif"
    parts = "".join(where.format(c=c, name=name) for c, name in enumerate(names))
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0">'
        '<Image ID="Image:0"><Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeC="2" SizeT="1" SizeX="30" '
        'SizeY="40" SizeZ="1" Type="uint8"><Channel ID="C:0"/><Channel ID="C:1"/>'
        f"{parts}</Pixels></Image></OME>"
    )
    for c, name in enumerate(names):
        tifffile.imwrite(folder / name, _PIXELS[c], description=xml, metadata=None, tile=(16, 16))


def _picture(name: str, mode: str = "RGB", **options: object) -> Make:
    return lambda folder: Image.fromarray(_LAST).convert(mode).save(folder / name, **options)


def _npy(folder: Path) -> None:
    np.save(folder / "image.npy", _PIXELS)


def _table(folder: Path) -> None:
    for name in ("a", "b", "c"):
        Image.fromarray(_LAST).save(folder / f"{name}.png")
    (folder / "labels.csv").write_text(
        "image,label,split,age\na.png,cat,train,1.5\nb.png,dog,val,2\nc.png,cat,train,3\n"
    )


def _scans(folder: Path) -> None:
    """DICOM and a slide in several files: the parts that are read before OpenSlide opens them."""
    elements = ((0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1\0"), (0x0020, 0x000E, b"UI", b"1.2.3.4\0"))
    content = bytes(128) + b"DICM"
    for group, number, kind, value in elements:
        content += struct.pack("<HH2sH", group, number, kind, len(value)) + value
    (folder / "image.dcm").write_bytes(content)
    (folder / "image.vms").write_text("[Virtual Microscope Specimen]\nImageFile=a.jpg\nMapFile=map.jpg\n")
    Image.fromarray(_LAST).save(folder / "a.jpg")


def _digits(folder: Path) -> None:
    for split in ("train", "t10k"):
        images = np.zeros((20, 28, 28), np.uint8)
        images[range(20), range(20)] = 255
        head = struct.pack(">IIII", 2051, 20, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = bytes(range(10)) * 2
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 20) + labels)


def _rates(folder: Path) -> None:
    (folder / "rates.json").write_text(json.dumps({KEY: asdict(NOMINAL["cpu"])}))


def _run(folder: Path) -> None:
    make_run(folder)


SEEDS: dict[str, dict[str, Make]] = {
    "store": {"whole": _store, "unfinished": _unfinished_store},
    "zarr": {
        "v2 blosc": _zarr(2, compressors=Blosc()),
        "v2 gzip": _zarr(2, compressors=GZip()),
        "v2 zstd": _zarr(2, compressors=Zstd()),
        "v2 lz4": _zarr(2, compressors=LZ4()),
        "v2 bz2": _zarr(2, compressors=BZ2()),
        "v2 lzma": _zarr(2, compressors=LZMA()),
        "v3 zstd": _zarr(3, compressors=(ZstdCodec(), Crc32cCodec()), dimension_names=("c", "y", "x")),
        "v3 gzip": _zarr(3, compressors=GzipCodec()),
        "v3 shards": _zarr(3, shards=(3, 16, 16), compressors=BloscCodec()),
        "ome": _ome_zarr,
        "bioformats2raw": _raw_ome_zarr,
    },
    "tiff": {
        "tiles": _tiff(tile=(16, 16), compression="deflate", predictor=True),
        "strips": _tiff(rowsperstrip=8, compression="lzw"),
        "jpeg": _tiff(tile=(16, 16), compression="jpeg"),
        "mapped": _tiff(),
        "planes": _tiff(data=_PIXELS, photometric="minisblack", planarconfig="separate", tile=(16, 16)),
        "ome": _tiff(data=_PIXELS, photometric="minisblack", ome=True, metadata={"axes": "CYX"}),
        "imagej": _tiff(data=_PIXELS, photometric="minisblack", imagej=True, metadata={"axes": "CYX"}),
        "pyramid": _pyramid,
        "two files": _two_file_ome,
    },
    "picture": {
        "png": _picture("image.png"),
        "palette": _picture("image.png", "P", transparency=0),
        "grey": _picture("image.png", "L"),
        "jpeg": _picture("image.jpg", progressive=True, exif=Image.Exif()),
        "webp": _picture("image.webp"),
        "gif": _picture("image.gif"),
        "bmp": _picture("image.bmp"),
        "ppm": _picture("image.ppm"),
    },
    "npy": {"npy": _npy},
    "table": {"table": _table},
    "scans": {"scans": _scans},
    "digits": {"digits": _digits},
    "rates": {"rates": _rates},
    "run": {"run": _run},
    "checkpoint": {"run": _run},
}
