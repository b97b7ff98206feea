"""Packs CIFAR-10's shards losslessly to 58 %, to be carried to another machine, and unpacks them there.

    python benchmarks/gpu/shards.py pack DATA PACKED
    python benchmarks/gpu/shards.py unpack PACKED DATA

DATA holds cifar10_train_1.npz to cifar10_train_5.npz and cifar10_test.npz, or some of them. A packed shard holds sheets of
500 images one below the other, as WebP. Packing takes a minute, unpacking a second or two; nothing is compared, as the
library checks the arrays' SHA-256 when it reads them. Needs NumPy and Pillow.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SHEET, SIDE = 500, 32
EFFORT = 5  # of WebP's 0 to 6, the last of which takes many times as long for a per cent


def packed_sheet(images: np.ndarray) -> np.ndarray:
    """Images (n, 3, 32, 32) of bytes as one WebP file's bytes."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(images.transpose(0, 2, 3, 1)).reshape(-1, SIDE, 3)).save(
        stream, "webp", lossless=True, quality=100, method=EFFORT
    )
    return np.frombuffer(stream.getvalue(), np.uint8)


def unpacked_sheet(packed: np.ndarray) -> np.ndarray:
    """The images of `packed_sheet`."""
    sheet = np.asarray(Image.open(io.BytesIO(packed.tobytes())).convert("RGB"))
    return sheet.reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)


def pack(source: Path, target: Path) -> None:
    """Pack one shard."""
    with np.load(source, allow_pickle=False) as shard, ThreadPoolExecutor() as pool:
        sheets = pool.map(packed_sheet, np.split(shard["x"], range(SHEET, len(shard["x"]), SHEET)))
        np.savez(target, y=shard["y"], **{f"sheet_{i:04d}": sheet for i, sheet in enumerate(sheets)})


def unpack(source: Path, target: Path) -> None:
    """Unpack one shard."""
    with np.load(source, allow_pickle=False) as packed, ThreadPoolExecutor() as pool:
        names = sorted(name for name in packed.files if name.startswith("sheet_"))
        images = np.concatenate(list(pool.map(unpacked_sheet, [packed[name] for name in names])))
        np.savez(target, x=images, y=packed["y"])


def main() -> None:
    """Pack or unpack a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    one: Callable[[Path, Path], None] = pack if options.way == "pack" else unpack
    for path in sorted(options.source.glob("cifar10_*.npz")):
        one(path, options.target / path.name)


if __name__ == "__main__":
    main()
