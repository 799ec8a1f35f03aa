"""uint8 image batches to model-ready tensors in one pass, bit for bit as torchvision would."""

from pixfuse import reference
from pixfuse._library import empty_cache, info
from pixfuse.functional import normalize
from pixfuse.normalization import (
    CIFAR10,
    CIFAR100,
    CLIP,
    FASHION_MNIST,
    IMAGENET,
    IMAGENET_DPN,
    KINETICS,
    MNIST,
    SIGNED,
    SVHN,
    UNIT,
    Normalization,
)
from pixfuse.pixels import channel_histogram, denormalize, image_moments

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CLIP",
    "FASHION_MNIST",
    "IMAGENET",
    "IMAGENET_DPN",
    "KINETICS",
    "MNIST",
    "SIGNED",
    "SVHN",
    "UNIT",
    "Normalization",
    "channel_histogram",
    "denormalize",
    "empty_cache",
    "image_moments",
    "info",
    "normalize",
    "reference",
]
