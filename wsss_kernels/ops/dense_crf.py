"""Mean field of a fully connected CRF: contract, checks, registration; and the unaries it starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wsss_kernels import _check, _dispatch
from wsss_kernels.colour import check_picture
from wsss_kernels.reference.dense_crf import mean_field


def dense_crf(
    image: Tensor,
    unary: Tensor,
    *,
    iterations: int = 10,
    gaussian: tuple[float, float] = (3.0, 3.0),
    bilateral: tuple[float, float, float] = (80.0, 13.0, 10.0),
) -> Tensor:
    """Marginals of a fully connected CRF with Gaussian edge potentials: what pydensecrf computes, to its rounding.

        Q = softmax_C(-unary), then `iterations` times
        Q = softmax_C(-unary + g_compat K_g Q + b_compat K_b Q),   K = n F n,  n = 1 / sqrt(F 1 + 1e-20)

    F_g filters with a Gaussian over (x, y), F_b over (x, y, r, g, b), both on the permutohedral lattice, as pydensecrf
    does with its defaults (Potts compatibility, symmetric normalisation): exact Gaussians give other labels. A pixel
    sends to itself too. A compat of 0 switches a term off; without both the result is softmax(-unary).

    Args:
        image: [B, 3, H, W] RGB, uint8 or floating point 0..255 (used as it is; beyond 0..255 counts as the nearer end,
            NaN as 0).
        unary: [B, C, H, W] negative log probabilities, see `unary_from_probabilities` and `unary_from_labels`;
            float16, bfloat16, float32, or float64 (the reference). +infinity forbids a label. It gets no gradient.
        iterations: whole number >= 0; 10 as published.
        gaussian: (sigma of x and y in pixels, compat), sigma > 0.
        bilateral: (sigma of x and y in pixels, sigma of red, green and blue in grey levels, compat), sigmas > 0.
            Published sets beside the default (PSA): IRN (50, 5, 10); VWE gaussian (1, 3), bilateral (64, 3, 4).

    Returns:
        [B, C, H, W] marginals, contiguous, in the dtype of unary; each pixel sums to 1. NaN in unary makes its pixel
        NaN, and those of the same image that the filters reach from it. Where nothing decides between labels, as in a
        picture of noise, mean field amplifies rounding from one iteration to the next, any float32 one: marginals up
        to 4e-3 from the float64 reference were seen after 10 iterations, of the float32 reference likewise.

    Memory: about (C + 40) H W floats, an image at a time, and C for each lattice point (0.05 to 1 H W) and for each
    point of every tile of 32 x 64 pixels (0.2 to 1.3 H W, up to 6 H W for noise), C rounded up to the vector width.

    Raises:
        TypeError, ValueError: an argument outside this contract, named; unary that requires grad outside no_grad;
            sigmas so small (of the order of 0.1) that the lattice has no numbers left for its points.

    Source: Kraehenbuehl and Koltun, NIPS 2011; lattice: Adams, Baek and Davis, Eurographics 2010.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> picture = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
        >>> unary = wk.unary_from_probabilities(torch.rand(1, 2, 24, 32).softmax(1))
        >>> wk.dense_crf(picture, unary).shape
        torch.Size([1, 2, 24, 32])
    """
    check_image_and("unary", image, unary)
    _check.whole("iterations", iterations, "a whole number >= 0", least=0)
    g_xy, g_compat = check_term("gaussian", gaussian, "(sigma_xy, compat)")
    b_xy, b_rgb, b_compat = check_term("bilateral", bilateral, "(sigma_xy, sigma_rgb, compat)")
    return run_crf(image, unary, iterations, (g_xy, g_xy, g_compat), (b_xy, b_xy, b_rgb, b_rgb, b_rgb, b_compat))


def unary_from_labels(labels: Tensor, num_classes: int, *, confidence: float = 0.7) -> Tensor:
    """Energies of labels that are right with a given probability; the rest is spread evenly over the other classes.

        unary[b, c] = -log(confidence) where labels[b] = c, else -log((1 - confidence) / (num_classes - 1))

    A label outside 0..num_classes - 1 (255, the usual "ignore") is unsure: log(num_classes) for every class. With one
    class there is nothing to choose: zeros.

    Args:
        labels: [B, H, W] whole numbers; 0 is a class like any other.
        num_classes: C >= 1.
        confidence: in (0, 1); 0.7 as published.

    Returns:
        [B, C, H, W] float32.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> wk.unary_from_labels(torch.tensor([[[0, 255]]]), 2, confidence=0.5).flatten().tolist()
        [0.6931471824645996, 0.6931471824645996, 0.6931471824645996, 0.6931471824645996]
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be a tensor [B, H, W] of whole numbers, got {_check.describe(labels)}")
    if labels.dim() != 3:
        raise ValueError(f"labels must be [B, H, W], got {_check.describe(labels)}")
    _check.whole("num_classes", num_classes, "a whole number >= 1", least=1)
    confidence = _check.number("confidence", confidence, "a probability in (0, 1)", above=0)
    if confidence >= 1:
        raise ValueError(f"confidence must be a probability in (0, 1), got {confidence!r}")
    if num_classes == 1:
        return torch.zeros(labels.shape, device=labels.device)[:, None]
    labels = labels[:, None].long()
    classes = torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    others = -math.log((1 - confidence) / (num_classes - 1))
    unary = torch.where(labels == classes, -math.log(confidence), others)
    unsure = (labels < 0) | (labels >= num_classes)
    return torch.where(unsure, math.log(num_classes), unary).float()


def unary_from_probabilities(probs: Tensor, *, clip: float = 1e-5) -> Tensor:
    """Energies of class probabilities: -log(clip(probs, clip, 1)).

    Args:
        probs: [B, C, H, W] in 0..1, of any sum (PSA passes score stacks as they are); NaN stays NaN.
        clip: smallest probability, in (0, 1]; 1e-5 as published.

    Returns:
        [B, C, H, W] in the dtype of probs. A constant for the gradient.

    Raises:
        TypeError, ValueError: an argument outside this contract, named.

    Example:
        >>> import torch, wsss_kernels as wk
        >>> wk.unary_from_probabilities(torch.ones(1, 1, 1, 2)).abs().tolist()
        [[[[0.0, 0.0]]]]
    """
    _check.tensor("probs", probs, "B C H W")
    clip = _check.number("clip", clip, "a probability in (0, 1]", above=0)
    if clip > 1:
        raise ValueError(f"clip must be a probability in (0, 1], got {clip!r}")
    values = probs.detach() if probs.dtype == torch.float64 else probs.detach().float()
    return (-values.clamp(clip, 1).log()).to(probs.dtype)


def check_image_and(name: str, image: Tensor, maps: Tensor) -> None:
    """An RGB picture and maps [B, C, H, W] of the same batch, size and device."""
    _check.tensor(name, maps, "B C H W")
    check_picture("image", image)
    batch, _, height, width = maps.shape
    if tuple(image.shape) != (batch, 3, height, width):
        raise ValueError(
            f"image must be [B, 3, H, W] = {[batch, 3, height, width]}, as {name} is, got {_check.describe(image)}"
        )
    _check.same_device(name, maps, "image", image)


def check_term(name: str, term: object, contract: str) -> tuple[float, ...]:
    count = contract.count(",") + 1
    if not isinstance(term, (tuple, list)):
        raise TypeError(f"{name} must be {contract}, got {_check.describe(term)}")
    if len(term) != count:
        raise ValueError(f"{name} must be {contract}, got {len(term)} numbers")
    sigmas = (_check.number(name, sigma, f"{contract} with sigmas > 0", above=0) for sigma in term[:-1])
    return (*sigmas, _check.number(name, term[-1], f"{contract} of finite numbers"))


def check_lattice(name: str, height: int, width: int, sigmas: Sequence[float]) -> None:
    """The points must have distinct numbers of 60 bits, and coordinates that float32 can tell apart."""
    dim = len(sigmas)
    extent = (width, height, 255, 255, 255)
    most = [extent[i] / sigmas[i] * (math.sqrt(2 / 3) * (dim + 1) / math.sqrt((i + 1) * (i + 2))) for i in range(dim)]
    points = 1.0
    for j in range(dim):
        reach = sum(most[j:]) + (j * most[j - 1] if j else 0.0)
        points = points * (reach / (dim + 1) + 12)
        if not reach <= 2.0**20:
            break
    if not (reach <= 2.0**20 and points <= 2.0**54):
        raise ValueError(f"{name} must have larger sigmas for an image of this size, got {tuple(sigmas)}")


def run_crf(
    image: Tensor, unary: Tensor, iterations: int, gaussian: Sequence[float], bilateral: Sequence[float]
) -> Tensor:
    """Checked but for the sigmas' size: gaussian (sigma x, y, compat), bilateral (sigma x, y, r, g, b, compat)."""
    if unary.requires_grad and torch.is_grad_enabled():
        raise ValueError("unary must not require grad: dense_crf has no gradient (call it under torch.no_grad())")
    height, width = unary.shape[-2:]
    check_lattice("gaussian", height, width, gaussian[:-1])
    check_lattice("bilateral", height, width, bilateral[:-1])
    if not _dispatch.runs_native("dense_crf", unary):
        return mean_field(image, unary, iterations, gaussian, bilateral)
    arguments = (iterations, list(gaussian), list(bilateral))
    if _dispatch.calls_directly(unary, image):
        return (_dense_crf_cuda if unary.is_cuda else _dense_crf_cpu)(image, unary, *arguments)
    return torch.ops.wsss_kernels.dense_crf(image, unary, *arguments)


_dispatch.NO_TRITON_KERNEL.add("dense_crf")
_dispatch.LIBRARY.define(
    "dense_crf(Tensor image, Tensor unary, int iterations, float[] gaussian, float[] bilateral) -> Tensor"
)


def _dense_crf_cpu(
    image: Tensor, unary: Tensor, iterations: int, gaussian: list[float], bilateral: list[float]
) -> Tensor:
    assert _dispatch.native is not None
    picture, x = _dispatch.as_kernel_input(image), _dispatch.as_kernel_input(unary)
    out = torch.empty_like(x)
    _dispatch.native.dense_crf(
        picture.data_ptr(), x.data_ptr(), out.data_ptr(), *x.shape, iterations, gaussian, bilateral,
        torch.get_num_threads(),
    )  # fmt: skip
    return _dispatch.as_output(out, unary.dtype)


def _dense_crf_cuda(
    image: Tensor, unary: Tensor, iterations: int, gaussian: list[float], bilateral: list[float]
) -> Tensor:
    assert _dispatch.native is not None
    picture, x = _dispatch.as_kernel_input(image), _dispatch.as_kernel_input(unary)
    out = torch.empty_like(x)
    call = _dispatch.CudaCall(x)
    arguments = (*x.shape, iterations, gaussian, bilateral)
    workspace = call.workspace(_dispatch.native.dense_crf_cuda_workspace(*arguments))
    _dispatch.native.dense_crf_cuda(
        picture.data_ptr(), x.data_ptr(), out.data_ptr(), *arguments, workspace.data_ptr(), workspace.numel(),
        call.index, call.stream,
    )  # fmt: skip
    return _dispatch.as_output(out, unary.dtype)


def _dense_crf_fake(image: Tensor, unary: Tensor, *_: object) -> Tensor:
    return torch.empty_like(unary, memory_format=torch.contiguous_format)


_dispatch.LIBRARY.impl("dense_crf", _dense_crf_cpu, "CPU")
_dispatch.LIBRARY.impl("dense_crf", _dense_crf_cuda, "CUDA")
torch.library.register_fake("wsss_kernels::dense_crf", _dense_crf_fake, lib=_dispatch.LIBRARY)
