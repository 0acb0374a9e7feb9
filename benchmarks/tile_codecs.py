"""Size and speed of codecs for the tile store, on binary and on photographic images.

    python -m benchmarks.tile_codecs

Each codec in turn writes an image as one shard of 512x512 chunks and reads it back, in several rounds; times
are medians over the rounds. The binary image is UltraMNIST's, the photograph scikit-learn's, mirrored to
2048x2048 pixels.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import zarr
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from benchmarks.record import append
from streamcnn.data.tile_store.arrays import CHUNK, shard_size
from streamcnn.data.ultramnist import Recipe, Spec, load_digits, make_image

CODECS: dict[str, tuple[BytesBytesCodec, ...]] = {
    "none": (),
    "zstd 1": (ZstdCodec(level=1),),
    "zstd 5": (ZstdCodec(level=5),),
    "blosc lz4 bitshuffle": (BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=1),),
    "blosc zstd 3 bitshuffle": (BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=1),),
    "blosc zstd 5 bitshuffle": (BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=1),),
    "blosc zstd 5": (BloscCodec(cname="zstd", clevel=5, shuffle="noshuffle", typesize=1),),
}


def images() -> dict[str, NDArray[np.uint8]]:
    """The test images, uint8 (C, H, W)."""
    binary = make_image(
        Spec(seed=0, recipe=Recipe.BALANCED, size=4000), "train", 0, load_digits("uci")
    ).pixels
    photograph = np.moveaxis(load_sample_images().images[0], -1, 0)
    _, height, width = photograph.shape
    mirrored = np.pad(photograph, ((0, 0), (0, 2048 - height), (0, 2048 - width)), mode="symmetric")
    return {"binary 4000x4000": binary, "photograph 2048x2048": mirrored}


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    record: Annotated[bool, typer.Option(help="Append to results/tile_codecs.jsonl.")] = True,
) -> None:
    """Print one line for each image and codec."""
    command = "python -m benchmarks.tile_codecs " + " ".join(sys.argv[1:])
    times: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    sizes: dict[tuple[str, str], int] = {}
    pictures = images()
    for _ in range(rounds):
        for image in pictures:
            for codec in CODECS:
                write, read, nbytes = _write_and_read(pictures[image], CODECS[codec])
                times[image, codec].append((write, read))
                sizes[image, codec] = nbytes
    for (image, codec), measured in times.items():
        write, read = (statistics.median(column) for column in zip(*measured, strict=True))
        fields: dict[str, Any] = {
            "case": f"{image}, {codec}",
            "stored_bytes": sizes[image, codec],
            "ratio": round(pictures[image].nbytes / sizes[image, codec], 1),
            "write_seconds": round(write, 3),
            "read_seconds": round(read, 3),
        }
        print(append("tile_codecs", command, **fields) if record else fields, flush=True)


def _write_and_read(image: NDArray[np.uint8], codec: tuple[BytesBytesCodec, ...]) -> tuple[float, float, int]:
    """Seconds to write, seconds to read all of it, and bytes on disk."""
    channels, height, width = image.shape
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        array = zarr.create_array(
            folder,
            shape=image.shape,
            chunks=(channels, CHUNK, CHUNK),
            shards=(channels, *shard_size((channels, height, width), 1)),
            dtype=image.dtype,
            compressors=(*codec, Crc32cCodec()),
            config={"write_empty_chunks": True},
        )
        array[:] = image
        written = time.perf_counter()
        found = np.asarray(array[:])
        read = time.perf_counter()
        assert np.array_equal(found, image)
        nbytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return written - start, read - written, nbytes


if __name__ == "__main__":
    typer.run(main)
