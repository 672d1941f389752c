"""Pictures, maps, labels, and sets of them."""

from wsss_models.data.dataset import open_dataset
from wsss_models.data.pictures import PictureSet

__all__ = ["PictureSet", "open_dataset"]
