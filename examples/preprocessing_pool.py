"""Preprocessing in worker processes that feeds a training loop: `spoolipc.imap` in the place of `Pool.imap`.

Images are cropped, scaled and normalised by two workers while the loop fits a linear model to batches of them. The
generator is read as the loop goes on, so any number of images passes in the same memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import spoolipc

Array = np.ndarray[Any, Any]
SIZE = 64


def images(count: int) -> Iterator[dict[str, Array]]:
    """Raw images of 1080p, brighter at the left or at the right, and which."""
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 120, 1920, dtype=np.float32)
    for number in range(count):
        label = number % 2
        noise = random.integers(0, 100, (1080, 1), dtype=np.uint8)
        yield {"image": noise + (ramp if label else ramp[::-1]).astype(np.uint8), "label": np.array(label)}


def prepare(sample: dict[str, Array]) -> dict[str, Array]:
    """Crop the middle, scale it down to 64 x 64 by averaging, normalise it: what a worker does."""
    image = sample["image"][28:1052, 448:1472].astype(np.float32)
    small = image.reshape(SIZE, 16, SIZE, 16).mean((1, 3))
    return {"image": (small - small.mean()) / (small.std() + 1e-6), "label": sample["label"]}


def batches(samples: Iterator[dict[str, Array]], size: int) -> Iterator[tuple[Array, Array]]:
    """The samples, so many at a time; copied, as a batch is one array."""
    batch = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield np.stack([one["image"].ravel() for one in batch]), np.stack([one["label"] for one in batch])
            batch = []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200, help="how many there are (default 200)")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare them (default 2)")
    options = parser.parse_args()
    if options.images < 32 or options.workers < 1:
        parser.error("--images must be at least 32, and --workers at least 1")

    weights = np.zeros(SIZE * SIZE)
    right: list[bool] = []
    start = time.perf_counter()
    with spoolipc.imap(prepare, images(options.images), options.workers) as prepared:
        for pixels, labels in batches(prepared, 16):
            guesses = 1 / (1 + np.exp(-pixels @ weights))
            right += ((guesses > 0.5) == labels).tolist()
            weights += 1e-3 * pixels.T @ (labels - guesses)
    seconds = time.perf_counter() - start

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    late = right[len(right) // 2 :]
    print(
        f"{len(right)} images in {seconds:.1f} s, {len(right) / seconds:.0f} a second, peak memory {peak} MB"
    )
    print(f"of the second half {sum(late)} of {len(late)} were told apart: {all(late)}")
    sys.exit(not all(late))


if __name__ == "__main__":
    main()
