"""ResNet-38, wide ("Model A1" of Wu, Shen and van den Hengel, 2016), output stride 8, as AffinityNet published it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet38(nn.Module):
    """Pre-activated residual blocks; parameter names as in the published .pth files.

    Args:
        drop: probabilities of the channel dropout in b6 and b7.

    Shapes: `features` gives the inputs of b5 and b6, normalised and rectified, and the output: 512, 1024 and 4096
    channels, all at H/8.
    """

    channels = (512, 1024, 4096)
    strides = (8, 8, 8)
    classifier_names = ("fc8.", "fc8_20.", "fc8_200.", "linear1000.", "f8_3.", "f8_4.", "f8_5.", "f9.")
    untrained = ("conv1a", "b2", "b2_1", "b2_2")  # stay as they are in the published training

    def __init__(self, *, drop: tuple[float, float] = (0.3, 0.5)) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self._names: list[str] = []
        self._stage("b2", 3, 64, 128, 128, stride=2)
        self._stage("b3", 3, 128, 256, 256, stride=2)
        self._stage("b4", 6, 256, 512, 512, stride=2)
        self._stage("b5", 3, 512, 512, 1024, first_dilation=1, dilation=2)
        self.b6 = Bottleneck(1024, 2048, dilation=4, drop=drop[0])
        self.b7 = Bottleneck(2048, 4096, dilation=4, drop=drop[1])
        self.bn7 = nn.BatchNorm2d(4096)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def _stage(
        self,
        name: str,
        count: int,
        ins: int,
        mid: int,
        outs: int,
        *,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
    ) -> None:
        for i in range(count):
            block = (
                Block(ins, mid, outs, stride, (first_dilation, dilation))
                if i == 0
                else Block(outs, mid, outs, 1, (dilation, dilation))
            )
            self._names.append(name if i == 0 else f"{name}_{i}")
            setattr(self, self._names[-1], block)

    def features(self, images: Tensor) -> list[Tensor]:
        x = self.conv1a(images)
        for name in self._names:
            x, inside = getattr(self, name)(x)
            if name == "b5":
                taps = [inside]
        x, inside = self.b6(x)
        taps.append(inside)
        x, _ = self.b7(x)
        taps.append(F.relu(self.bn7(x)))
        return taps


class Block(nn.Module):
    """Two 3 x 3 convolutions. Returns the sum and the normalised, rectified input."""

    def __init__(self, ins: int, mid: int, outs: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        first, second = dilations
        self.bn_branch2a = nn.BatchNorm2d(ins)
        self.conv_branch2a = nn.Conv2d(ins, mid, 3, stride, padding=first, dilation=first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(mid)
        self.conv_branch2b1 = nn.Conv2d(mid, outs, 3, padding=second, dilation=second, bias=False)
        self.conv_branch1 = None if ins == outs and stride == 1 else nn.Conv2d(ins, outs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = F.relu(self.bn_branch2a(x))
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(inside)
        y = F.relu(self.bn_branch2b1(self.conv_branch2a(inside)))
        return shortcut + self.conv_branch2b1(y), inside


class Bottleneck(nn.Module):
    """1 x 1, dilated 3 x 3, 1 x 1, with dropout of whole channels before the last two."""

    def __init__(self, ins: int, outs: int, *, dilation: int, drop: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(ins)
        self.conv_branch2a = nn.Conv2d(ins, outs // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(outs // 4)
        self.dropout_2b1 = nn.Dropout2d(drop)
        self.conv_branch2b1 = nn.Conv2d(outs // 4, outs // 2, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(outs // 2)
        self.dropout_2b2 = nn.Dropout2d(drop)
        self.conv_branch2b2 = nn.Conv2d(outs // 2, outs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(ins, outs, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = F.relu(self.bn_branch2a(x))
        y = self.dropout_2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(inside))))
        y = self.dropout_2b2(F.relu(self.bn_branch2b2(self.conv_branch2b1(y))))
        return self.conv_branch1(inside) + self.conv_branch2b2(y), inside
