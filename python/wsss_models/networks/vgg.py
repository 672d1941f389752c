"""VGG-16 with a large field of view (DeepLab's), output stride 8; parameter names as in the Caffe weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))  # in, out, convolutions


class VGG16(nn.Module):
    """Convolutions conv1_1 to conv5_3, then fc6 (3 x 3, dilated) and fc7 (1 x 1).

    Pools are 3 x 3; the first three halve the map, conv5 is dilated by 2.

    Args:
        fc6_dilation: 1 in AffinityNet's classifier, 4 in its affinity network, 12 in DeepLab's.
        width: channels of fc6 and fc7.
        drop: probability of the channel dropout after fc6 and fc7.
        top: False leaves fc6 and fc7 out: the last stage is conv5, pooled.

    Shapes: `features` gives conv4 (512 channels), conv5 (512) and fc7 (`width`) or the pooled conv5 (512), all at H/8.
    """

    strides = (8, 8, 8)
    classifier_names = ("fc8.", "f8_3.", "f8_4.", "f8_5.", "f9.", "gn8_3.", "gn8_4.", "gn8_5.")

    def __init__(self, *, fc6_dilation: int = 1, width: int = 1024, drop: float = 0.5, top: bool = True) -> None:
        super().__init__()
        self.channels = (512, 512, width if top else 512)
        self.top = top
        if not top:
            self.classifier_names = ("fc6", "fc7", *type(self).classifier_names)
        for i, (ins, outs, count) in enumerate(_STAGES, start=1):
            dilation = 2 if i == 5 else 1
            for j in range(count):
                conv = nn.Conv2d(ins if j == 0 else outs, outs, 3, padding=dilation, dilation=dilation)
                setattr(self, f"conv{i}_{j + 1}", conv)
        if top:
            self.fc6 = nn.Conv2d(512, width, 3, padding=fc6_dilation, dilation=fc6_dilation)
            self.fc7 = nn.Conv2d(width, width, 1)
            self.drop6, self.drop7 = nn.Dropout2d(drop), nn.Dropout2d(drop)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def features(self, images: Tensor) -> list[Tensor]:
        x, stages = images, []
        for i, (_, _, count) in enumerate(_STAGES, start=1):
            for j in range(count):
                x = F.relu(getattr(self, f"conv{i}_{j + 1}")(x))
            stages.append(x)
            x = F.max_pool2d(x, 3, stride=2 if i < 4 else 1, padding=1)
        x = F.avg_pool2d(x, 3, stride=1, padding=1)
        if self.top:
            x = self.drop6(F.relu(self.fc6(x)))
            x = self.drop7(F.relu(self.fc7(x)))
        return [stages[3], stages[4], x]
