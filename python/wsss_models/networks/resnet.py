"""ResNet (He et al., CVPR 2016) with free strides and dilations; parameter names as torchvision's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_DEPTHS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}
# Output stride -> (strides of the stem and layers 2 to 4, dilations of layers 1 to 4).
OUTPUT_STRIDES = {
    32: ((2, 2, 2, 2), (1, 1, 1, 1)),
    16: ((2, 2, 2, 1), (1, 1, 1, 2)),
    8: ((2, 2, 1, 1), (1, 1, 2, 4)),
}


class ResNet(nn.Module):
    """Five stages: the stem with its pooling, then layers 1 to 4.

    Args:
        depth: 18, 34, 50 or 101.
        strides: of the stem and of layers 2 to 4. (2, 2, 2, 1) without dilation is what the published WSSS systems use
            (output stride 16).
        dilations: of layers 1 to 4. The first 3 x 3 convolution of a layer still has the dilation of the layer before
            it, as in torchvision: with public weights a stride left out changes nothing at the pixels that stay.
        width: channels of the stem; 64 in all public weights.

    Shapes: `features` gives [B, width, H/4, W/4], then layers of 1, 2, 4 and 8 times width (from depth 50 on,
    4 times as many channels).
    """

    classifier_names = ("fc.",)  # parts of public weights that have no place here

    def __init__(
        self,
        depth: int,
        *,
        strides: tuple[int, int, int, int] = (2, 2, 2, 1),
        dilations: tuple[int, int, int, int] = (1, 1, 1, 1),
        width: int = 64,
    ) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _DEPTHS))}, got {depth}")
        kind, counts = _DEPTHS[depth]
        block = Basic if kind == "basic" else Bottleneck
        widths = tuple(block.expansion * outs for outs in (width, 2 * width, 4 * width, 8 * width))
        self.channels = (width, *widths)
        steps = (strides[0] * 2, 1, *strides[1:])
        self.strides = tuple(_product(steps[: i + 1]) for i in range(5))
        self.conv1 = nn.Conv2d(3, width, 7, stride=strides[0], padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        ins, before = width, 1
        for i, count in enumerate(counts):
            blocks = []
            for j in range(count):
                first = before if j == 0 else dilations[i]
                blocks.append(block(ins, width << i, steps[i + 1] if j == 0 else 1, (first, dilations[i])))
                ins = widths[i]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            before = dilations[i]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        stages = [x]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            stages.append(layer(stages[-1]))
        return stages

    def freeze_to(self, stage: int) -> None:
        """This stage (0 = the stem) and those before it learn no more."""
        for module in (self.conv1, self.bn1, *(getattr(self, f"layer{i}") for i in range(1, stage + 1))):
            module.requires_grad_(False)


class Basic(nn.Module):
    expansion = 1

    def __init__(self, ins: int, width: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        first, second = dilations
        self.conv1 = nn.Conv2d(ins, width, 3, stride=stride, padding=first, dilation=first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=second, dilation=second, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(ins, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, ins: int, width: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        dilation = dilations[0]
        self.conv1 = nn.Conv2d(ins, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(ins, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


def _shortcut(ins: int, outs: int, stride: int) -> nn.Sequential | None:
    if ins == outs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(ins, outs, 1, stride=stride, bias=False), nn.BatchNorm2d(outs))


def _product(numbers: tuple[int, ...]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product
