"""labels_from_maps and the automatic background threshold."""

import math

import pytest
import torch

from wsss_kernels.labels import background_threshold, labels_from_maps


def scene(batch: int = 1, classes: int = 2, height: int = 40, width: int = 60, seed: int = 0) -> torch.Tensor:
    """Noise of about 0.05 with one bright square a class."""
    generator = torch.Generator().manual_seed(seed)
    maps = 0.05 + 0.02 * torch.randn(batch, classes, height, width, generator=generator)
    for c in range(classes):
        maps[:, c, 5 + 12 * c : 15 + 12 * c, 10:30] += 0.7
    return maps.clamp_min(0)


def test_threshold_by_hand():
    # u = sqrt(score): 0.3 for three pixels, 1.0 for one. Both classes have no variance, so every split between them
    # costs the same and the soft minimum is the mean of log u over the cell edges from 0.3 to 1.
    maps = torch.tensor([[[[0.09, 0.09], [0.09, 1.0]]]], dtype=torch.float64)
    edges = [0.2 + 0.8 / 128 * (i + 1) for i in range(128)]
    between = [u for u in edges if 0.3 < u < 1 - 1e-9]
    expected = math.exp(2 * sum(map(math.log, between)) / len(between))
    torch.testing.assert_close(background_threshold(maps), torch.tensor([expected], dtype=torch.float64))


def test_constant_threshold_by_hand():
    maps = torch.tensor([[[[0.1, 0.6, 0.3, 0.3]], [[0.2, 0.5, 0.3, 0.4]]]])
    # max: 0.2, 0.6 (class 1), 0.3 (a tie with the threshold), 0.4 (class 2)
    assert labels_from_maps(maps, background=0.3).tolist() == [[[0, 1, 0, 2]]]
    assert labels_from_maps(maps, background=0.0).tolist() == [[[2, 1, 1, 2]]]  # ties: the lowest index


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_score_equal_to_the_threshold_is_background(dtype):
    assert labels_from_maps(torch.full((1, 1, 2, 2), 0.3, dtype=dtype), background=0.3).sum() == 0


def test_background_map_by_hand():
    maps = torch.tensor([[[[0.5, 0.2, 0.4]], [[0.4, 0.7, 0.4]], [[0.1, 0.1, 0.4]]]])
    assert labels_from_maps(maps, background=None).tolist() == [[[0, 1, 0]]]
    assert labels_from_maps(maps, background=None, class_ids=[7, 9]).tolist() == [[[0, 7, 0]]]
    logits = -maps.flip(3)  # negative scores compare as they are
    assert labels_from_maps(logits, background=None).tolist() == [[[0, 2, 2]]]


def test_auto_finds_the_squares():
    maps = scene()
    labels = labels_from_maps(maps)
    expected = torch.zeros(1, 40, 60, dtype=torch.int64)
    expected[:, 5:15, 10:30], expected[:, 17:27, 10:30] = 1, 2
    assert labels.dtype == torch.int64
    assert torch.equal(labels, expected)


def test_auto_is_the_threshold_of_the_helper():
    maps = scene(batch=3)
    threshold = background_threshold(maps)
    assert threshold.shape == (3,) and threshold.dtype == torch.float32
    assert torch.equal(labels_from_maps(maps), labels_from_maps(maps, background=threshold))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_auto_does_not_depend_on_the_scale(factor):
    maps = scene(batch=2)
    torch.testing.assert_close(background_threshold(maps * factor), background_threshold(maps) * factor)
    assert torch.equal(labels_from_maps(maps * factor), labels_from_maps(maps))


def test_auto_does_not_depend_on_the_number_of_pixels():
    maps = scene()
    larger = maps.repeat_interleave(3, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(background_threshold(larger), background_threshold(maps))


def test_threshold_rises_with_a_leak():
    # The same disc, clean and with a skirt that falls from 0.4 at its edge to the noise over the whole picture.
    y, x = torch.meshgrid(torch.arange(80.0) - 40, torch.arange(100.0) - 50, indexing="ij")
    radius = (x * x + y * y).sqrt()
    noise = 0.03 * torch.randn(1, 1, 80, 100, generator=torch.Generator().manual_seed(0))
    clean = (torch.where(radius < 18, 0.85, 0.03) + noise).clamp_min(0)
    leaky = (torch.where(radius < 18, 0.85, 0.4 * (1 - (radius - 18) / 46)) + noise).clamp_min(0)
    assert 0.15 < background_threshold(clean) < 0.5
    assert background_threshold(leaky) > 0.45
    for maps in (clean, leaky):
        assert (labels_from_maps(maps)[0] == (radius < 18)).float().mean() > 0.99


def test_batch_equals_single_and_list():
    maps = scene(batch=4, seed=3) * torch.tensor([1.0, 0.2, 5.0, 0.0])[:, None, None, None]
    together = labels_from_maps(maps)
    assert torch.equal(together, torch.stack([labels_from_maps(m) for m in maps]))
    as_list = labels_from_maps(list(maps))
    assert isinstance(as_list, list)
    assert torch.equal(together, torch.stack(as_list))


def test_list_of_ragged_maps_with_class_ids():
    maps = [scene(1, 2)[0], scene(1, 1, 20, 33)[0], torch.zeros(0, 4, 5)]
    labels = labels_from_maps(maps, class_ids=[[12, 15], torch.tensor([3]), []])
    assert [tuple(x.shape) for x in labels] == [(40, 60), (20, 33), (4, 5)]
    assert [sorted(set(x.flatten().tolist())) for x in labels] == [[0, 12, 15], [0, 3], [0]]
    assert labels_from_maps([]) == []
    several = labels_from_maps(maps, background=torch.tensor([9.0, 0.3, 0.3]))
    assert several[0].sum() == 0 and several[1].sum() > 0


def test_class_ids_for_each_image():
    maps = scene(batch=2)
    labels = labels_from_maps(maps, class_ids=torch.tensor([[5, 6], [7, 8]], dtype=torch.int32))
    assert labels[0].unique().tolist() == [0, 5, 6] and labels[1].unique().tolist() == [0, 7, 8]
    shared = labels_from_maps(maps, class_ids=(20, 1))
    assert shared.unique().tolist() == [0, 1, 20]


def test_ignore_band_by_hand():
    maps = torch.tensor([[[[0.05, 0.1, 0.2, 0.3, 0.31]]]])
    assert labels_from_maps(maps, background=0.3, ignore=(0.1, 0.3)).tolist() == [[[0, 0, 255, 255, 1]]]
    both = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.15]]]])
    assert labels_from_maps(both, background=None, ignore=(0.0, 0.5)).tolist() == [[[0, 255]]]


def test_ignore_band_around_the_automatic_threshold():
    maps = torch.linspace(0, 1, 101)[None, None, None].repeat(2, 1, 1, 1) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    t = background_threshold(maps)
    labels = labels_from_maps(maps, ignore=(0.5 * t, 1.5 * t))
    assert torch.equal(labels[0], labels[1])
    assert labels[0].unique().tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    ("maps", "label"),
    [
        (torch.zeros(2, 3, 4, 5), 0),  # nothing scores: all background
        (torch.ones(2, 3, 4, 5), 1),  # a constant map: all object
        (torch.full((1, 1, 1, 1), 0.2), 1),
        (torch.zeros(1, 1, 1, 1), 0),
        (torch.full((1, 2, 3, 3), math.nan), 0),
        (torch.full((1, 2, 3, 3), -1.0), 0),
        (torch.zeros(2, 0, 3, 4), 0),  # no class
    ],
)
def test_degenerate_maps(maps, label):
    labels = labels_from_maps(maps)
    assert labels.shape == (maps.shape[0], *maps.shape[2:])
    assert (labels == label).all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("background", ["auto", 0.3])
def test_empty_maps(shape, background):
    assert labels_from_maps(torch.zeros(shape), background=background).shape == (shape[0], *shape[2:])
    assert background_threshold(torch.zeros(shape)).shape == shape[:1]


def test_nan_and_infinity_stay_in_their_image():
    maps = scene(batch=3)
    clean = labels_from_maps(maps)
    broken = maps.clone()
    broken[0, 0, 0, 0] = math.nan
    broken[1, 1, 0, 0] = math.inf
    labels = labels_from_maps(broken)
    assert torch.equal(labels[0], clean[0]) and torch.equal(labels[2], clean[2])
    assert labels[1, 0, 0] == 2
    assert background_threshold(broken).isfinite().all()


def test_one_pixel_object():
    maps = torch.full((1, 1, 100, 100), 0.02)
    maps[0, 0, 50, 50] = 1.0
    assert labels_from_maps(maps).sum() == 1


def test_memory_format_and_gradient_do_not_matter():
    maps = scene(batch=2)
    expected = labels_from_maps(maps)
    assert torch.equal(labels_from_maps(maps.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(labels_from_maps(maps.transpose(2, 3)).transpose(1, 2), expected)
    assert not labels_from_maps(maps.clone().requires_grad_()).requires_grad
    assert not background_threshold(maps.clone().requires_grad_()).requires_grad


def test_half_precision():
    maps = scene()
    labels = labels_from_maps(maps)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert (labels_from_maps(maps.to(dtype)) == labels).float().mean() > 0.999


def test_compiles_without_a_graph_break():
    maps = scene(batch=2)
    compiled = torch.compile(lambda m: labels_from_maps(m, class_ids=[3, 4]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(maps), labels_from_maps(maps, class_ids=[3, 4]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"maps": torch.zeros(3, 4)}, ValueError, "maps must be"),
        ({"maps": torch.zeros(1, 2, 3, 4, dtype=torch.int64)}, TypeError, "maps must be a floating point"),
        ({"maps": [[1.0]]}, TypeError, "maps must be"),
        ({"background": "otsu"}, ValueError, "background must be"),
        ({"background": True}, TypeError, "background must be"),
        ({"background": math.nan}, ValueError, "background must be"),
        ({"background": torch.zeros(3)}, ValueError, "background must be"),
        ({"class_ids": [1]}, ValueError, "class_ids must be"),
        ({"class_ids": [1.0, 2.0]}, TypeError, "class_ids must be integers"),
        ({"class_ids": "ab"}, TypeError, "class_ids must be"),
        ({"ignore": 0.3}, TypeError, "ignore must be"),
        ({"ignore": (0.3,)}, ValueError, "ignore must be"),
        ({"ignore": (0.5, 0.1)}, ValueError, "low <= high"),
        ({"ignore": ("a", "b")}, TypeError, "ignore must be"),
        ({"maps": torch.zeros(1, 0, 3, 4), "background": None}, ValueError, "maps must hold the background"),
        ({"maps": [torch.zeros(1, 2, 2)], "class_ids": [[1], [2]]}, ValueError, "class_ids must be a list"),
        ({"maps": [torch.zeros(1, 2, 2)], "background": torch.zeros(2)}, ValueError, "background must be one number"),
        ({"maps": [torch.zeros(1, 1, 2, 2)]}, ValueError, "maps must be"),
    ],
)
def test_refusals(arguments, error, message):
    arguments = {"maps": torch.zeros(1, 2, 3, 4)} | arguments
    with pytest.raises(error, match=message):
        labels_from_maps(arguments.pop("maps"), **arguments)
