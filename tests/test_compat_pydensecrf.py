"""The stand-in for pydensecrf: same calls, same numbers; what it does not offer says so."""

import importlib.util

import numpy as np
import pytest
import torch

import wsss_kernels as wk
import wsss_kernels.compat.pydensecrf as dcrf
from wsss_kernels.compat.pydensecrf import densecrf, utils

needs_pydensecrf = pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is missing")
RANDOM = np.random.default_rng(0)
IMAGE = (RANDOM.random((20, 30, 3)) * 60 + np.linspace(0, 190, 30)[:, None]).astype(np.uint8)
PROBS = RANDOM.dirichlet(np.ones(4), 20 * 30).T.reshape(4, 20, 30).astype(np.float32, order="C")


def run(module, tools, **kinds):
    crf = module.DenseCRF2D(30, 20, 4)
    crf.setUnaryEnergy(tools.unary_from_softmax(PROBS))
    crf.addPairwiseGaussian(sxy=(3, 2), compat=3, **kinds)
    crf.addPairwiseBilateral(sxy=(40, 50), srgb=(13, 10, 17), rgbim=IMAGE, compat=5, **kinds)
    return np.array(crf.inference(3))


@needs_pydensecrf
@pytest.mark.parametrize("kernel", ["CONST_KERNEL", "DIAG_KERNEL", "FULL_KERNEL"])
def test_the_same_program(kernel):
    import pydensecrf.densecrf
    import pydensecrf.utils

    expected = run(pydensecrf.densecrf, pydensecrf.utils, kernel=getattr(pydensecrf.densecrf, kernel))
    out = run(dcrf, utils, kernel=getattr(dcrf, kernel), normalization=dcrf.NORMALIZE_SYMMETRIC)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    assert np.abs(out - expected).max() < 1e-4


@needs_pydensecrf
def test_the_same_constants():
    from pydensecrf import densecrf as theirs

    for name in ("CONST_KERNEL", "DIAG_KERNEL", "FULL_KERNEL", "NO_NORMALIZATION", "NORMALIZE_BEFORE",
                 "NORMALIZE_AFTER", "NORMALIZE_SYMMETRIC"):  # fmt: skip
        assert getattr(dcrf, name) == int(getattr(theirs, name))


@needs_pydensecrf
def test_the_same_unaries():
    from pydensecrf import utils as theirs

    labels = RANDOM.integers(0, 4, (5, 6))
    for count, zero_unsure in ((3, True), (4, False), (5, True)):
        np.testing.assert_allclose(
            utils.unary_from_labels(labels, count, 0.7, zero_unsure),
            theirs.unary_from_labels(labels, count, 0.7, zero_unsure),
            rtol=1e-6,
        )
    for scale, clip in ((None, 1e-5), (0.8, 1e-5), (0.8, None), (None, 0.1)):
        np.testing.assert_allclose(
            utils.unary_from_softmax(PROBS, scale, clip), theirs.unary_from_softmax(PROBS, scale, clip), rtol=1e-5
        )


def test_is_the_op():
    out = run(densecrf, utils)
    assert out.shape == (4, 600) and np.allclose(out.sum(0), 1, atol=1e-5)
    crf = dcrf.DenseCRF2D(30, 20, np.int64(4))
    crf.setUnaryEnergy(-np.log(PROBS.reshape(4, -1)))
    crf.addPairwiseBilateral(80, 13, IMAGE, np.float32(10))
    crf.addPairwiseGaussian(3, 3)
    expected = wk.dense_crf(torch.from_numpy(IMAGE).permute(2, 0, 1)[None], -torch.from_numpy(PROBS).log()[None])
    assert np.abs(crf.inference(10) - expected.reshape(4, -1).numpy()).max() < 1e-5


def test_without_terms_or_energies():
    crf = dcrf.DenseCRF2D(30, 20, 4)
    assert np.allclose(crf.inference(3), 0.25)
    crf.setUnaryEnergy(-np.log(PROBS))
    assert np.allclose(crf.inference(3), PROBS.reshape(4, -1), atol=1e-6)


CRF = dcrf.DenseCRF2D(30, 20, 4)


@pytest.mark.parametrize("call, error, words", [
    (lambda: dcrf.DenseCRF2D(30, 0, 4), ValueError, "h must be"),
    (lambda: dcrf.DenseCRF2D(30.5, 20, 4), TypeError, "w must be"),
    (lambda: CRF.setUnaryEnergy(np.zeros((4, 599))), ValueError, "u must be"),
    (lambda: CRF.setUnaryEnergy(np.zeros((600, 4))), ValueError, "u must be"),
    (lambda: CRF.setUnaryEnergy(np.zeros((4, 600), dtype=complex)), TypeError, "u must be"),
    (lambda: CRF.addPairwiseGaussian(-3, 3), ValueError, "sxy must be"),
    (lambda: CRF.addPairwiseGaussian((3, 3, 3), 3), ValueError, "sxy must be"),
    (lambda: CRF.addPairwiseGaussian(1e-300, 3), ValueError, "larger sigmas"),
    (lambda: CRF.addPairwiseGaussian(3, np.eye(4)), NotImplementedError, "compat"),
    (lambda: CRF.addPairwiseGaussian(3, 3, normalization=dcrf.NO_NORMALIZATION), NotImplementedError, "SYMMETRIC"),
    (lambda: CRF.addPairwiseGaussian(3, 3, kernel=7), ValueError, "kernel must be"),
    (lambda: CRF.addPairwiseBilateral(80, 13, IMAGE.astype(float), 10), TypeError, "rgbim must be uint8"),
    (lambda: CRF.addPairwiseBilateral(80, 13, IMAGE.transpose(1, 0, 2), 10), ValueError, "rgbim must be"),
    (lambda: CRF.addPairwiseBilateral(80, 0, IMAGE, 10), ValueError, "srgb must be"),
    (lambda: CRF.inference(-1), ValueError, "niter must be"),
    (lambda: CRF.setUnary(None), NotImplementedError, "offers"),
    (lambda: CRF.addPairwiseEnergy(np.zeros((2, 600)), 3), NotImplementedError, "offers"),
    (CRF.startInference, NotImplementedError, "offers"),
    (lambda: CRF.stepInference(1, 2, 3), NotImplementedError, "offers"),
    (lambda: CRF.klDivergence(1), NotImplementedError, "offers"),
    (lambda: dcrf.DenseCRF, AttributeError, "does not offer"),
    (lambda: dcrf.nonsense, AttributeError, "nonsense"),
    (lambda: densecrf.LogisticUnary, AttributeError, "does not offer"),
    (lambda: utils.create_pairwise_gaussian, AttributeError, "does not offer"),
    (lambda: utils.nonsense, AttributeError, "nonsense"),
    (lambda: utils.unary_from_labels(np.zeros(3), 2, 0.7), TypeError, "labels must be"),
    (lambda: utils.unary_from_labels(np.array([3]), 2, 0.7), ValueError, r"labels must be in 0\.\.2"),
    (lambda: utils.unary_from_labels(np.array([-1]), 2, 0.7, False), ValueError, "labels must be"),
    (lambda: utils.unary_from_labels(np.array([1]), 1, 0.7), ValueError, "n_labels must be"),
    (lambda: utils.unary_from_labels(np.array([1]), 2, 1.0), ValueError, "gt_prob must be"),
    (lambda: utils.unary_from_softmax(PROBS, scale=0), ValueError, "scale must be"),
])  # fmt: skip
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_one_term_of_each_kind():
    crf = dcrf.DenseCRF2D(30, 20, 4)
    crf.addPairwiseGaussian(3, 3)
    crf.addPairwiseBilateral(80, 13, IMAGE, 10)
    with pytest.raises(NotImplementedError, match="one Gaussian"):
        crf.addPairwiseGaussian(1, 3)
    with pytest.raises(NotImplementedError, match="one bilateral"):
        crf.addPairwiseBilateral(50, 5, IMAGE, 10)
