"""The modules: what they hold, and that they are their ops."""

import pytest
import torch

import wsss_kernels as wk


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_word_encoder_is_its_op():
    torch.manual_seed(0)
    encoder, feats = wk.VisualWordEncoder(2048, temperature=4.0), rand(1, 2048, 5, 6).requires_grad_()
    assert list(encoder.state_dict()) == ["codebook"] and encoder.codebook.shape == (256, 2048)
    assert encoder.codebook.std().item() == pytest.approx(0.01276, rel=0.01)
    for got, expected in zip(encoder(feats), wk.soft_histogram(feats, encoder.codebook, temperature=4.0), strict=True):
        assert torch.equal(got, expected)
    encoder(feats)[0].square().sum().backward()
    assert feats.grad is None and encoder.codebook.grad.abs().max() > 0
    encoder.detach = False
    encoder(feats)[0].square().sum().backward()
    assert feats.grad.abs().max() > 0
    assert repr(encoder) == "VisualWordEncoder(dim=2048, words=256, temperature=4, detach=False)"


def test_word_encoder_under_autocast():
    encoder, feats = wk.VisualWordEncoder(16, 8), rand(1, 16, 5, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        histogram, *_ = encoder(feats)
    assert histogram.dtype == torch.bfloat16
    histogram.float().square().sum().backward()
    assert encoder.codebook.grad.dtype == torch.float32


def test_pool_is_its_op():
    pool, feats = wk.HybridSpatialPyramidPool((1, 3), gamma=1.0), rand(2, 4, 9, 10)
    assert torch.equal(pool(feats), wk.hspp(feats, levels=(1, 3), gamma=1.0)) and not pool.state_dict()
    assert torch.equal(wk.HybridSpatialPyramidPool()(feats), wk.hspp(feats))
    assert repr(pool) == "HybridSpatialPyramidPool(levels=(1, 3), gamma=1)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: wk.VisualWordEncoder(0), ValueError, "dim must be a whole number >= 1 of channels, got 0"),
        (lambda: wk.VisualWordEncoder(4, 0), ValueError, "words must be a whole number >= 1 of codewords, got 0"),
        (lambda: wk.VisualWordEncoder(4, temperature=0.0), ValueError, "temperature must be a number > 0"),
        (lambda: wk.VisualWordEncoder(4)(rand(1, 5, 2, 2)), ValueError, "codebook must hold"),
        (lambda: wk.HybridSpatialPyramidPool(()), ValueError, "levels must be"),
        (lambda: wk.HybridSpatialPyramidPool((0,)), ValueError, "levels must be"),
        (lambda: wk.HybridSpatialPyramidPool(gamma=-1.0), ValueError, "gamma must be"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
