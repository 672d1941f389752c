"""What a user would pick instead of wsss_kernels, written as carefully as a user can.

"published": the formulation of AffinityNet and IRNet, re-expressed. "library": the best that plain PyTorch and SciPy
offer for the same result. What does not pass through SciPy runs on the device of its tensors.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_kernels import neighbour_offsets

RADIUS = 5

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


# Walk -----------------------------------------------------------------------------------------------------------------


def transition_matrix(affinity: Tensor, beta: float) -> scipy.sparse.csr_array:
    """D^-1 W of one image's affinity [1, K, H, W] as float32 CSR [HW, HW]; degrees summed in float64."""
    _, _, height, width = affinity.shape
    number = np.arange(height * width, dtype=np.int32).reshape(height, width)
    weights = affinity[0].double().numpy() ** beta
    rows, columns, values = [number.ravel()], [number.ravel()], [np.ones(height * width)]
    for k, (dy, dx) in enumerate(neighbour_offsets(RADIUS)):
        here = (slice(0, max(0, height - dy)), slice(max(0, -dx), max(0, width - max(0, dx))))
        there = (slice(dy, None), slice(max(0, dx), width + min(0, dx)))
        i, j, w = number[here].ravel(), number[there].ravel(), weights[k][here].ravel()
        linked = w > 0
        i, j, w = i[linked], j[linked], w[linked]
        rows += [i, j]
        columns += [j, i]
        values += [w, w]
    row, value = np.concatenate(rows), np.concatenate(values)
    degree = np.bincount(row, value, minlength=height * width)
    matrix = scipy.sparse.coo_array((value / degree[row], (row, np.concatenate(columns))), shape=(len(degree),) * 2)
    return matrix.tocsr().astype(np.float32)


def to_torch_csr(matrix: scipy.sparse.csr_array) -> Tensor:
    """The same as a torch tensor; 32-bit indices, which MKL takes without a copy."""
    starts, columns = (torch.from_numpy(x.astype(np.int32)) for x in (matrix.indptr, matrix.indices))
    values = torch.from_numpy(matrix.data)
    return torch.sparse_csr_tensor(starts, columns, values, matrix.shape, check_invariants=False)


def torch_transition_csr(affinity: Tensor, beta: float) -> Tensor:
    """D^-1 W of a batch, block-diagonal [BHW, BHW], built where the affinity [B, K, H, W] lies."""
    width = affinity.shape[-1]
    shares = transition_planes(affinity, beta).flatten(1)  # [taps, BHW]
    moves = [0] + [s * (dy * width + dx) for dy, dx in neighbour_offsets(RADIUS) for s in (1, -1)]
    move, order = torch.tensor(moves, device=affinity.device).sort()
    values = shares[order].T.contiguous()  # a pixel's row, sorted by column
    columns = torch.arange(len(values), device=affinity.device)[:, None] + move
    linked = values > 0
    starts = F.pad(linked.sum(dim=1).cumsum(dim=0), (1, 0))
    return torch.sparse_csr_tensor(
        starts.int(), columns[linked].int(), values[linked], (len(values),) * 2, check_invariants=False
    )


def torch_csr_walk(maps: Tensor, matrix: Tensor, steps: int) -> Tensor:
    """`steps` sparse products, matrix [BHW, BHW] given. maps [B, C, H, W]."""
    x = maps.movedim(1, -1).flatten(0, 2).contiguous()  # [BHW, C]
    for _ in range(steps):
        x = matrix @ x
    batch, _, height, width = maps.shape
    return x.reshape(batch, height, width, -1).movedim(-1, 1).contiguous()


def scipy_csr_walk(maps: Tensor, matrix: scipy.sparse.csr_array, steps: int) -> Tensor:
    x = np.ascontiguousarray(maps[0].flatten(1).numpy().T)
    for _ in range(steps):
        x = matrix @ x
    return torch.from_numpy(np.ascontiguousarray(x.T)).view(maps.shape)


def transition_planes(affinity: Tensor, beta: float) -> Tensor:
    """[2K + 1, B, 1, H, W]: the pixel's own share, then those of the neighbours at +offset and at -offset."""
    margin = RADIUS - 1
    height, width = affinity.shape[-2:]
    weights = F.pad(affinity**beta, (margin,) * 4)
    planes = []
    for k, (dy, dx) in enumerate(neighbour_offsets(RADIUS)):
        y, x = margin - dy, margin - dx
        planes += [weights[:, k, margin:-margin, margin:-margin], weights[:, k, y : y + height, x : x + width]]
    stacked = torch.stack(planes)
    degree = 1 + stacked.sum(dim=0)
    return torch.cat([(1 / degree)[None], stacked / degree]).unsqueeze(2)


def shifted_walk(maps: Tensor, planes: Tensor, steps: int) -> Tensor:
    """`steps` times one multiply-add a neighbour over shifted views of two padded buffers; nothing is allocated."""
    margin = RADIUS - 1
    height, width = maps.shape[-2:]
    buffers = [F.pad(maps, (margin,) * 4), F.pad(maps, (margin,) * 4)]
    moves = [(s * dy, s * dx) for dy, dx in neighbour_offsets(RADIUS) for s in (1, -1)]
    views = [
        [b[..., margin + dy : margin + dy + height, margin + dx : margin + dx + width] for dy, dx in [(0, 0), *moves]]
        for b in buffers
    ]
    weights = planes.unbind()
    for step in range(steps):
        source, target = views[step % 2], views[1 - step % 2][0]
        torch.mul(weights[0], source[0], out=target)
        for weight, view in zip(weights[1:], source[1:], strict=True):
            target.addcmul_(weight, view)
    return views[steps % 2][0].clone()


def shifted_walk_autograd(maps: Tensor, affinity: Tensor, beta: float, steps: int) -> Tensor:
    """The same for autograd, differentiable in maps and affinity."""
    margin = RADIUS - 1
    height, width = maps.shape[-2:]
    weights = transition_planes(affinity, beta).unbind()
    moves = [(0, 0)] + [(s * dy, s * dx) for dy, dx in neighbour_offsets(RADIUS) for s in (1, -1)]
    x = maps
    for _ in range(steps):
        padded = F.pad(x, (margin,) * 4)
        x = torch.zeros_like(maps)
        for weight, (dy, dx) in zip(weights, moves, strict=True):
            x = x + weight * padded[..., margin + dy : margin + dy + height, margin + dx : margin + dx + width]
    return x


def dense_affinity(affinity: Tensor) -> Tensor:
    """Published: [1, K, H, W] -> the symmetric matrix [HW, HW] with 1 on its diagonal, by way of a sparse one."""
    _, _, height, width = affinity.shape
    n = height * width
    number = torch.arange(n, device=affinity.device).view(height, width)
    pairs, linked = [], []
    for k, (dy, dx) in enumerate(neighbour_offsets(RADIUS)):
        left, right = max(0, -dx), max(0, -dx, width - max(0, dx))
        here = (slice(0, max(0, height - dy)), slice(left, right))
        pairs.append(torch.stack([number[here].flatten(), number[here].flatten() + dy * width + dx]))
        linked.append(affinity[0, k][here].flatten())
    pair, value = torch.cat(pairs, dim=1), torch.cat(linked)
    own = number.flatten().expand(2, n)
    index = torch.cat([pair, pair.flip(0), own], dim=1)
    values = torch.cat([value, value, value.new_ones(n)])
    return torch.sparse_coo_tensor(index, values, (n, n), check_invariants=False).to_dense()


def dense_walk(maps: Tensor, dense: Tensor, beta: float, steps: int) -> Tensor:
    """Published: power, column sums, log2(steps) squarings, one product. steps is a power of two."""
    transition = dense**beta
    transition = transition / transition.sum(dim=0, keepdim=True)
    for _ in range(int(math.log2(steps))):
        transition = transition @ transition
    return (maps[0].flatten(1) @ transition).view(maps.shape)


# Affinity -------------------------------------------------------------------------------------------------------------


def published_pairs(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Flat indices of the sources [S] and of their neighbours [K, S]: all but the last rows and the outer columns."""
    margin = RADIUS - 1
    number = torch.arange(height * width).view(height, width)
    source = number[: height - margin, margin : width - margin].flatten()
    move = torch.tensor([dy * width + dx for dy, dx in neighbour_offsets(RADIUS)])
    return source, source + move[:, None]


def gathered_affinity(feats: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Published: [B, D, H, W] -> [B, K, S], every pair's features gathered into [B, D, K, S] first."""
    flat = feats.flatten(2)
    here = flat.index_select(2, source).unsqueeze(2)
    there = flat.index_select(2, target.flatten()).view(*flat.shape[:2], *target.shape)
    return torch.exp(-(there - here).abs().mean(dim=1))


def shifted_distances(feats: Tensor) -> list[Tensor]:
    """mean |f_i - f_j| of the in-map pairs of each neighbour, [B, rows, columns] each."""
    height, width = feats.shape[-2:]
    distances = []
    for dy, dx in neighbour_offsets(RADIUS):
        left, right = max(0, -dx), max(0, -dx, width - max(0, dx))
        here = feats[..., : max(0, height - dy), left:right]
        distances.append((here - feats[..., dy:, left + dx : right + dx]).abs().mean(dim=1))
    return distances


def shifted_affinity(feats: Tensor, *, automatic: bool = False) -> Tensor:
    """[B, D, H, W] -> [B, K, H, W] a pass over shifted views a neighbour; automatic = scaled by the mean distance."""
    height, width = feats.shape[-2:]
    distances = shifted_distances(feats)
    scale: Tensor | float = 1.0
    if automatic:
        pairs = sum(d[0].numel() for d in distances)
        scale = sum(d.sum(dim=(1, 2), keepdim=True) for d in distances) / pairs
    planes = []
    for (_, dx), distance in zip(neighbour_offsets(RADIUS), distances, strict=True):
        rows, columns = distance.shape[-2:]
        left = max(0, -dx)
        planes.append(F.pad(torch.exp(-distance / scale), (left, width - columns - left, 0, height - rows)))
    return torch.stack(planes, dim=1)


def pair_targets(labels: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Published: float masks [B, K, S] of pairs inside the background, inside one class, and between two."""
    flat = labels.flatten(1)
    here = flat[:, source].unsqueeze(1)
    there = flat[:, target.flatten()].view(len(labels), *target.shape)
    valid, equal = (here < 255) & (there < 255), here == there
    masks = (equal & (here == 0), equal & (here != 0) & valid, ~equal & valid)
    return masks[0].float(), masks[1].float(), masks[2].float()


def pair_loss(affinity: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the pairs' affinity [B, K, S]: background / 4 + foreground / 4 + between classes / 2."""
    background, foreground, between = (t.to(affinity.dtype) for t in targets)
    same, other = -torch.log(affinity + 1e-5), -torch.log((1 - affinity) + 1e-5)
    return (
        (background * same).sum() / (background.sum() + 1e-5) / 4
        + (foreground * same).sum() / (foreground.sum() + 1e-5) / 4
        + (between * other).sum() / (between.sum() + 1e-5) / 2
    )


def published_view(affinity: Tensor) -> Tensor:
    """[B, K, H, W] -> [B, K, S], the published pairs."""
    margin = RADIUS - 1
    return affinity[:, :, :-margin, margin:-margin].flatten(2)


def published_layout(pairs: Tensor, height: int, width: int) -> Tensor:
    """[B, K, S] -> [B, K, H, W], zero where no pair is built."""
    margin = RADIUS - 1
    planes = pairs.unflatten(2, (height - margin, width - 2 * margin))
    return F.pad(planes, (margin, margin, 0, margin))


# Both together --------------------------------------------------------------------------------------------------------


def background_map(cams: Tensor, alpha: float) -> Tensor:
    """[B, C, H, W] -> [B, C + 1, H, W], the map (1 - max)^alpha first."""
    strongest = (cams / cams.amax(dim=(2, 3), keepdim=True)).amax(dim=1, keepdim=True)
    return torch.cat([(1 - strongest) ** alpha, cams], dim=1)


def published_refine(cams: Tensor, feats: Tensor, alpha: float, steps: int = 256) -> Tensor:
    """Published: gathered affinity, dense matrix, dense walk."""
    height, width = feats.shape[-2:]
    pairs = gathered_affinity(feats, *(index.to(feats.device) for index in published_pairs(height, width)))
    dense = dense_affinity(published_layout(pairs, height, width))
    return dense_walk(background_map(cams, alpha), dense, 8.0, steps)


def library_refine(cams: Tensor, feats: Tensor, alpha: float, steps: int, *, automatic: bool) -> Tensor:
    """Shifted views, a CSR matrix, torch CSR products; automatic = scale by mean distance, maps by their maximum."""
    affinity = shifted_affinity(feats, automatic=automatic)
    if not automatic:
        affinity = published_layout(published_view(affinity), *feats.shape[-2:])
    if affinity.is_cuda:
        matrix = torch_transition_csr(affinity, 8.0)
    else:
        matrix = to_torch_csr(transition_matrix(affinity, 8.0))
    refined = torch_csr_walk(background_map(cams, alpha), matrix, steps)
    return refined / refined.amax() if automatic else refined


# Boundaries -----------------------------------------------------------------------------------------------------------


def published_paths(height: int, width: int, radius: int) -> list[Tensor]:
    """Pixels of the paths of all published pairs, by the number of points L on a path: [pairs, L, S] each.

    Sources lie in all but the last radius - 1 rows and the radius - 1 columns on either side.
    """
    margin = radius - 1
    number = torch.arange(height * width).view(height, width)
    rows, columns = height - margin, width - 2 * margin
    by_length: dict[int, list[Tensor]] = {}
    for offset in neighbour_offsets(radius):
        path = [number[dy : dy + rows, margin + dx : margin + dx + columns].flatten()
                for dy, dx in _points_between(offset)]  # fmt: skip
        by_length.setdefault(len(path), []).append(torch.stack(path))
    return [torch.stack(by_length[length]) for length in sorted(by_length)]


def _points_between(offset: tuple[int, int]) -> list[tuple[int, int]]:
    to_y, to_x = offset
    box = [(y, x) for y in range(to_y + 1) for x in range(min(0, to_x), max(0, to_x) + 1)]
    near = [(y, x) for y, x in box if (to_y * x - to_x * y) ** 2 < to_y**2 + to_x**2]
    return sorted(near, key=lambda point: -abs(point[0]) - abs(point[1]))


def gathered_boundary_affinity(boundary: Tensor, paths: list[Tensor]) -> Tensor:
    """[B, 1, H, W] -> [B, K, S], K grouped by path length: all pixels of all paths, then their maxima by pooling."""
    flat = boundary.flatten(1)
    planes = []
    for pixels in paths:
        pairs, length, sources = pixels.shape
        along = flat.index_select(1, pixels.flatten()).view(-1, pairs, length, sources)
        planes.append(1 - F.max_pool2d(along, (length, 1)).squeeze(2))
    return torch.cat(planes, dim=1)


def published_boundary_view(affinity: Tensor, radius: int) -> Tensor:
    """[B, K, H, W] in the order of neighbour_offsets -> [B, K, S], the published pairs grouped by path length."""
    margin = radius - 1
    lengths = [len(_points_between(offset)) for offset in neighbour_offsets(radius)]
    order = sorted(range(len(lengths)), key=lambda k: lengths[k])
    height, width = affinity.shape[-2:]
    return affinity[:, order, : height - margin, margin : width - margin].flatten(2)


def shifted_boundary_affinity(boundary: Tensor, radius: int) -> Tensor:
    """[B, 1, H, W] -> [B, K, H, W] by running maxima of shifted views, no gather."""
    height, width = boundary.shape[-2:]
    margin = radius - 1
    padded = F.pad(boundary[:, 0], (margin, margin, 0, margin))
    planes = []
    for dy, dx in neighbour_offsets(radius):
        largest = boundary[:, 0]
        for y, x in _points_between((dy, dx))[:-1]:
            largest = torch.maximum(largest, padded[:, y : y + height, margin + x : margin + x + width])
        inside = torch.zeros(height, width, dtype=boundary.dtype, device=boundary.device)
        inside[: max(0, height - dy), max(0, -dx) : max(0, width - max(0, dx))] = 1
        planes.append((1 - largest) * inside)
    return torch.stack(planes, dim=1)
