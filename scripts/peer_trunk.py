"""The EfficientNet trunk in PyTorch, from our own parameter tree: the peer that scripts/benchmark.py compares us with.

BatchNorm is folded on both sides alike, since the parameters are the same. Written as one would for speed on CPU:
channels_last, padding inside the convolution wherever it is the same on both sides, activations in place. The caller
runs it under `torch.inference_mode()`, and may hand it to `torch.compile`.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pushpull_jax.models.efficientnet import EfficientNet
from pushpull_jax.models.layers import Padding, pad_amounts


class Conv2d(nn.Conv2d):
    """A convolution that pads by the rule of its weight family."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, groups: int, rule: Padding) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups)
        self.rule = rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rule = {"kernel": self.kernel_size[0], "stride": self.stride[0], "padding": self.rule}
        (top, bottom), (left, right) = (pad_amounts(length, **rule) for length in x.shape[2:])
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), 1, self.groups)


def _conv(parameters: dict, *, stride: int = 1, padding: Padding = "tf", groups: int = 1) -> Conv2d:
    """With the kernel and bias of a layer of ours: dense [k,k,I,O], pointwise [I,O] or depthwise [k,k,C]."""
    kernel = np.asarray(parameters["kernel"], np.float32)
    if groups > 1:
        kernel = kernel[:, :, None, :]
    elif kernel.ndim == 2:
        kernel = kernel[None, None]
    size, _, inputs, outputs = kernel.shape
    conv = Conv2d(inputs * groups, outputs, size, stride=stride, groups=groups, rule=padding)
    conv.weight.data = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
    conv.bias.data = torch.from_numpy(np.array(parameters["bias"], np.float32))
    return conv


class Block(nn.Module):
    """The counterpart of our MBConv."""

    def __init__(self, parameters: dict, *, stride: int, lite: bool, padding: Padding) -> None:
        super().__init__()
        self.activation = nn.ReLU6(inplace=True) if lite else nn.SiLU(inplace=True)
        self.expand = _conv(parameters["expand"]) if "expand" in parameters else None
        channels = parameters["depthwise"]["kernel"].shape[-1]
        self.depthwise = _conv(parameters["depthwise"], stride=stride, padding=padding, groups=channels)
        self.squeeze = None if lite else _conv(parameters["squeeze"])
        self.excite = None if lite else _conv(parameters["excite"])
        self.project = _conv(parameters["project"])
        first = self.expand if self.expand is not None else self.depthwise
        self.identity = stride == 1 and first.in_channels == self.project.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = x
        if self.expand is not None:
            x = self.activation(self.expand(x))
        x = self.activation(self.depthwise(x))
        if self.squeeze is not None:
            gate = self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True))))
            x = x * torch.sigmoid(gate)
        x = self.project(x)
        return x + inputs if self.identity else x


class Trunk(nn.Module):
    """The counterpart of our EfficientNet: [B,3,H,W] normalised images -> the five stage ends, NCHW."""

    def __init__(self, network: EfficientNet, parameters: dict) -> None:
        super().__init__()
        options = {"lite": network.lite, "padding": network.padding}
        self.activation = nn.ReLU6(inplace=True) if network.lite else nn.SiLU(inplace=True)
        self.stem = _conv(parameters["stem"], stride=2, padding=network.padding)
        strides = [row.stride if repeat == 0 else 1 for row in network.rows for repeat in range(row.repeats)]
        self.blocks = nn.ModuleList(
            Block(parameters[f"block_{i}"], stride=stride, **options) for i, stride in enumerate(strides)
        )
        lasts = np.cumsum([row.repeats for row in network.rows]) - 1
        self.ends = [int(last) for last, row in zip(lasts, network.rows, strict=True) if row.end]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, ends = self.activation(self.stem(x)), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                ends.append(x)
        return tuple(ends)


def torch_trunk(network: EfficientNet, parameters: dict) -> nn.Module:
    """The trunk in PyTorch, in evaluation mode and channels_last.

    Args:
        network: any of our EfficientNets, of either weight family.
        parameters: its tree, as `load_backbone` or `network.init` returns it.

    Returns:
        A module of normalised images [B,3,H,W] float32, best given in channels_last, to five stage ends [B,C,h,w].
    """
    return Trunk(network, parameters).eval().requires_grad_(False).to(memory_format=torch.channels_last)
