"""Transformer tokens as feature maps: for backbones of timm, Hugging Face and DINOv2."""

from __future__ import annotations

from torch import Tensor

_MOST_PREFIX = 16  # class token, distillation token and registers; more is a wrong grid rather


def tokens_to_map(tokens: Tensor, grid: tuple[int, int], *, prefix: int | None = None) -> Tensor:
    """The patch tokens of a vision transformer as a feature map for `refine_cams`.

        out[b, d, y, x] = tokens[b, prefix + y w + x, d]

    Args:
        tokens: [B, prefix + h w, D], patches row by row; the tokens before them (class token, registers) are dropped.
        grid: (h, w) = (picture height // patch size, picture width // patch size), of the picture the network saw.
        prefix: tokens before the patches; None = all that are more than h w, up to 16.

    Returns:
        Tensor: [B, D, h, w], a view of tokens.

    Raises:
        TypeError: tokens is no tensor, or grid or prefix no whole numbers.
        ValueError: the number of tokens does not fit.

    Example:
        >>> import torch
        >>> tokens_to_map(torch.rand(2, 5 + 16 * 24, 384), (16, 24)).shape  # a class token and four registers
        torch.Size([2, 384, 16, 24])
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor [B, n, D], got {type(tokens).__name__}")
    if tokens.dim() != 3:
        raise ValueError(f"tokens must be [B, n, D], got shape {list(tokens.shape)}")
    if not isinstance(grid, (tuple, list)) or not all(_is_whole(side) for side in grid):
        raise TypeError(f"grid must be a pair of whole numbers (h, w), got {grid!r}")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be a pair (h, w) of at least 1, got {tuple(grid)}")
    height, width = grid
    patches, count = height * width, tokens.shape[1]
    if prefix is None:
        prefix = count - patches
        if not 0 <= prefix <= _MOST_PREFIX:
            raise ValueError(
                f"tokens must hold h w = {height} x {width} = {patches} patches after at most {_MOST_PREFIX} prefix "
                f"tokens, got {count}: is the grid (picture height // patch size, picture width // patch size)?"
            )
    elif not _is_whole(prefix):
        raise TypeError(f"prefix must be a whole number or None, got {prefix!r}")
    if prefix < 0 or count != prefix + patches:
        wanted = f"{prefix} + {height} x {width} = {prefix + patches}"
        raise ValueError(f"tokens must be prefix + h w = {wanted}, got {count}")
    return tokens[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
