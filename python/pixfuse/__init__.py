"""uint8 image batches to model-ready tensors in one pass, bit for bit as torchvision would."""

from pixfuse import nn, reference, transforms
from pixfuse._library import empty_cache, info
from pixfuse.activity import UnitActivity
from pixfuse.certification import certified_dead
from pixfuse.collate import Collate
from pixfuse.convolution import conv_bias_relu
from pixfuse.functional import crop_mirror_normalize, normalize
from pixfuse.loader import DeviceLoader
from pixfuse.monitor import DeadUnitMonitor, DeadUnitWarning
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
    PerImageStandardization,
)
from pixfuse.pixels import (
    channel_histogram,
    denormalize,
    image_moments,
    standardize_per_image,
)
from pixfuse.statistics import ChannelStatistics, fold_of

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
    "ChannelStatistics",
    "Collate",
    "DeadUnitMonitor",
    "DeadUnitWarning",
    "DeviceLoader",
    "Normalization",
    "PerImageStandardization",
    "UnitActivity",
    "certified_dead",
    "channel_histogram",
    "conv_bias_relu",
    "crop_mirror_normalize",
    "denormalize",
    "empty_cache",
    "fold_of",
    "image_moments",
    "info",
    "nn",
    "normalize",
    "reference",
    "standardize_per_image",
    "transforms",
]
