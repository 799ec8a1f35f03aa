"""Images to test with: every byte value, and every way in which a batch can lie in memory."""

import warnings
from collections.abc import Callable

import torch

Size = tuple[int, int, int, int]

# Around the widths of vector registers, of the blocks that the loops work in, and of nothing.
WIDTHS = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    257,
)
LONG_WIDTHS = (511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 16384, 16385)


def random_bytes(*shape: int) -> torch.Tensor:
    """Bytes that differ from call to call but not from run to run: see `conftest._seed`."""
    return torch.randint(256, shape, dtype=torch.uint8)


def all_values(channels: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """(1, C, H, W) images in which every channel has every byte value, each in its own order."""
    pixels = torch.arange(height * width).view(1, 1, height, width)
    shift = 37 * torch.arange(channels).view(1, channels, 1, 1)
    return ((pixels + shift) % 256).to(torch.uint8)


def _padded_rows_of_pixels(n: int, c: int, h: int, w: int) -> torch.Tensor:
    row_bytes = w * c + 5  # as image libraries pad rows: not a multiple of the pixel
    rows = random_bytes(n, h, row_bytes)
    return rows.as_strided((n, c, h, w), (h * row_bytes, 1, row_bytes, c))


def _sliding_windows(n: int, c: int, h: int, w: int) -> torch.Tensor:
    strip = random_bytes(c, h, w + n)
    return strip.as_strided((n, c, h, w), (1, h * (w + n), w + n, 1))


def _overlapping_pixels(n: int, c: int, h: int, w: int) -> torch.Tensor:
    """The last channel of a pixel is the first one of the next: a sliding window over bytes."""
    step = max(c - 1, 1)
    rows = random_bytes(n, h, w * step + c)
    return rows.as_strided((n, c, h, w), (*rows.stride()[:1], 1, rows.stride(1), step))


# Each makes a (N, C, H, W) view of fresh random bytes.
LAYOUTS: dict[str, Callable[[int, int, int, int], torch.Tensor]] = {
    "nchw": random_bytes,
    "channels_last": lambda n, c, h, w: random_bytes(n, h, w, c).permute(0, 3, 1, 2),
    "offset": lambda n, c, h, w: random_bytes(n * c * h * w + 7)[7:].view(n, c, h, w),
    "crop": lambda n, c, h, w: random_bytes(n, c, h + 5, w + 7)[:, :, 2 : 2 + h, 3 : 3 + w],
    "crop_channels_last": lambda n, c, h, w: random_bytes(n, h + 5, w + 7, c)[
        :, 2 : 2 + h, 3 : 3 + w
    ].permute(0, 3, 1, 2),
    "padded_rows": lambda n, c, h, w: random_bytes(n, c, h, w + 13)[..., :w],
    "padded_rows_of_pixels": _padded_rows_of_pixels,
    "one_byte_more_per_pixel": lambda n, c, h, w: random_bytes(n, h, w, c + 1)[..., :c].permute(
        0, 3, 1, 2
    ),
    "alpha_first": lambda n, c, h, w: random_bytes(n, h, w, c + 1)[..., 1:].permute(0, 3, 1, 2),
    "every_second_pixel": lambda n, c, h, w: random_bytes(n, c, 2 * h, 3 * w)[:, :, ::2, ::3],
    "every_second_pixel_channels_last": lambda n, c, h, w: random_bytes(n, 2 * h, 2 * w, c)[
        :, ::2, ::2
    ].permute(0, 3, 1, 2),
    "every_second_image": lambda n, c, h, w: random_bytes(2 * n, c, h, w)[::2],
    "every_second_channel": lambda n, c, h, w: random_bytes(n, 2 * c, h, w)[:, ::2],
    "transposed": lambda n, c, h, w: random_bytes(n, c, w, h).transpose(2, 3),
    "transposed_channels_last": lambda n, c, h, w: random_bytes(n, w, h, c).permute(0, 3, 2, 1),
    "channels_first_of_all": lambda n, c, h, w: random_bytes(c, n, h, w).transpose(0, 1),
    "batch_last": lambda n, c, h, w: random_bytes(c, h, w, n).permute(3, 0, 1, 2),
    "rows_of_planes": lambda n, c, h, w: random_bytes(n, h, c, w).transpose(1, 2),
    "same_image": lambda n, c, h, w: random_bytes(1, c, h, w).expand(n, c, h, w),
    "same_channel": lambda n, c, h, w: random_bytes(n, 1, h, w).expand(n, c, h, w),
    "same_row": lambda n, c, h, w: random_bytes(n, c, 1, w).expand(n, c, h, w),
    "same_pixel": lambda n, c, h, w: random_bytes(n, c, 1, 1).expand(n, c, h, w),
    "sliding_windows": _sliding_windows,
    "overlapping_pixels": _overlapping_pixels,
}


def whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Every byte of the memory that a view looks into, the ones between its elements too."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def relaid(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same view of the same bytes, on another device."""
    storage = whole_storage(images).to(device)
    return storage.as_strided(images.shape, images.stride(), images.storage_offset())


def quantized(*shape: int) -> torch.Tensor:
    with warnings.catch_warnings():  # torch deprecates them, and still has them
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(shape), 1.0, 0, torch.quint8)
