"""What segmentation code uses of pydensecrf, on `wsss_kernels.dense_crf`.

    import wsss_kernels.compat.pydensecrf as dcrf                      # import pydensecrf.densecrf as dcrf
    from wsss_kernels.compat.pydensecrf.utils import unary_from_softmax

Offered: DenseCRF2D with at most one Gaussian and one bilateral term of one number as compatibility, symmetric
normalisation. Whatever else pydensecrf has raises NotImplementedError (AttributeError for names of
the module).
"""

from wsss_kernels.compat.pydensecrf import utils
from wsss_kernels.compat.pydensecrf.densecrf import (
    CONST_KERNEL,
    DIAG_KERNEL,
    FULL_KERNEL,
    NO_NORMALIZATION,
    NORMALIZE_AFTER,
    NORMALIZE_BEFORE,
    NORMALIZE_SYMMETRIC,
    DenseCRF2D,
    __getattr__,
)

__all__ = [
    "CONST_KERNEL",
    "DIAG_KERNEL",
    "FULL_KERNEL",
    "NORMALIZE_AFTER",
    "NORMALIZE_BEFORE",
    "NORMALIZE_SYMMETRIC",
    "NO_NORMALIZATION",
    "DenseCRF2D",
    "__getattr__",
    "utils",
]
