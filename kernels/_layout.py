"""Memory formats of images (B, C, H, W). Needs no triton: the ops share it."""

import torch


def channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, as in channels_last tensors and slices of them. No for what is
    contiguous as it is."""
    return x.stride(1) == 1 and not x.is_contiguous()


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format that an output made from ``x`` takes."""
    return torch.channels_last if channels_last(x) else torch.contiguous_format


def empty_image(x: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """An uninitialised (B, channels, height, width) with batch, type, device and memory format of ``x``."""
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def pixels(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H*W): a view where rows follow one another evenly, else a copy in the same memory format."""
    even = 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)
    return (x if even else x.contiguous(memory_format=memory_format(x))).flatten(2)
