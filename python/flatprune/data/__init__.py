"""Image sets as tensors on the training device: what they are read from, and how they are made ready."""

from flatprune.data.arrays import MAX_CLASSES
from flatprune.data.dataset import (
    Dataset,
    Normalization,
    augmented,
    batch_indices,
    load_dataset,
    noisy_labels,
    to_pixels,
)
from flatprune.data.sources import DIGITS, SOURCES, Images, content_files, read_images

__all__ = [
    "DIGITS",
    "MAX_CLASSES",
    "SOURCES",
    "Dataset",
    "Images",
    "Normalization",
    "augmented",
    "batch_indices",
    "content_files",
    "load_dataset",
    "noisy_labels",
    "read_images",
    "to_pixels",
]
