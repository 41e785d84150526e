"""Image sets as tensors: in order for calibration and evaluation, augmented for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ampdeploy.data.decode import UnreadableImageError, decode_rgb, read_bytes
from ampdeploy.data.folder import DECODE_THREADS, ImageRecord, ImageSet
from ampdeploy.data.transforms import eval_transform, train_transform
from ampdeploy.errors import ConfigError, DataError
from ampdeploy.models.spec import ModelSpec


def iter_batches(images: ImageSet, spec: ModelSpec, batch_size: int) -> Iterator[Tensor]:
    """Preprocessed images in record order.

    Args:
        images: What to load.
        spec: Whose preprocessing to use.
        batch_size: Images per batch; the last batch may be smaller.

    Yields:
        (b, 3, S, S) float32 on the CPU.

    Raises:
        ConfigError: The batch size is below 1.
        DataError: A file changed or vanished since the scan.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}; it must be 1 or more.")
    return _batches(images, spec, batch_size)


def _batches(images: ImageSet, spec: ModelSpec, batch_size: int) -> Iterator[Tensor]:
    transform = eval_transform(spec)

    def load(record: ImageRecord) -> Tensor:
        return transform(load_record(record))

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for start in range(0, len(images), batch_size):
            yield torch.stack(list(pool.map(load, images.records[start : start + batch_size])))


def load_all(images: ImageSet, spec: ModelSpec) -> Tensor:
    """All images of a set, preprocessed, as one tensor (B, 3, S, S).

    Raises:
        DataError: The set is empty, or a file changed or vanished since the scan.
    """
    if not images.records:
        raise DataError(f"no images of {images.root} were chosen, so there is nothing to load.")
    return next(iter_batches(images, spec, len(images)))


def load_record(record: ImageRecord) -> Image.Image:
    """Decode a scanned file, after making sure that it still is what was scanned.

    Raises:
        DataError: It changed or vanished.
    """
    try:
        data = read_bytes(record.path)
        if hashlib.sha256(data).hexdigest() == record.sha256:
            return decode_rgb(data, record.path)
        problem = "its content changed"
    except UnreadableImageError as error:
        problem = error.reason
    raise DataError(
        f"image {record.path} is not what it was when the folder was scanned: {problem}. Put it "
        "back, or run again to scan the folder anew."
    )


class TrainImages(Dataset[Tensor]):
    """Augmented images for distillation.

    Item `index` of epoch `n` is the same tensor whenever and wherever it is loaded: its randomness
    comes from (seed, epoch, index) alone, not from workers, order, or what ran before.
    """

    def __init__(
        self, images: ImageSet, spec: ModelSpec, *, min_scale: float, strong: bool, seed: int
    ) -> None:
        """See `train_transform` for `min_scale` and `strong`."""
        self._records = images.records
        self._transform = train_transform(spec, min_scale=min_scale, strong=strong)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the items that follow.

        Workers have a copy of the dataset: call it before a DataLoader starts iterating, and do
        not use ``persistent_workers``.
        """
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Tensor:
        """(3, S, S) float32.

        Raises:
            DataError: The file changed or vanished since the scan.
        """
        index = range(len(self))[index]  # -1 is the last, and past the end is an IndexError
        image = load_record(self._records[index])
        key = hashlib.sha256(f"{self._seed}/{self._epoch}/{index}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs too, and those are not restored.
            torch.default_generator.manual_seed(int.from_bytes(key[:8], "little"))
            return self._transform(image)
