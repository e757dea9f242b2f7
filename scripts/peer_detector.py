"""A whole detector in PyTorch, from the parameters of ours: a photograph to its score and map, as `detect` has them.

For detectors of the paper's kind: the map is the norm of the residual, upsampled and smoothed; no blocks. Written
plainly: torch's own resizing with antialias, the trunk and the reconstructor of the other peers.
"""

from typing import Any

import numpy as np
import torch
from peer_reconstructor import torch_reconstructor
from peer_trunk import torch_trunk
from torch import nn
from torch.nn import functional as F

from pushpull_jax.detector import Network


class TorchDetector(nn.Module):
    """[H,W,3] uint8 on the host -> score [1] and map [1,S,S], on the host."""

    def __init__(self, network: Network, parameters: dict[str, Any]) -> None:
        super().__init__()
        backbone = network.features.backbone
        self.size, self.grid = network.image_size, network.features.grid
        self.window = max(1, round(network.window * network.scale))
        self.trunk = torch_trunk(backbone.network, parameters["backbone"])
        self.reconstructor = torch_reconstructor(network.reconstructor, parameters["reconstructor"])
        sigma = network.smoothing * network.scale
        offsets = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
        kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
        for name, values in {
            "mean": np.reshape(backbone.mean, (1, 3, 1, 1)),
            "deviation": np.reshape(backbone.deviation, (1, 3, 1, 1)),
            "kernel": (kernel / kernel.sum())[None, None, None],
            **parameters["standardisation"],
        }.items():
            self.register_buffer(name, torch.tensor(np.asarray(values, np.float32)))

    def forward(self, photograph: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = photograph.to(self.mean.device).permute(2, 0, 1)[None].float()
        images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        ends = self.trunk((images - self.mean) / self.deviation)
        grid = (self.grid, self.grid)
        ends = [F.interpolate(end, grid, mode="bilinear", align_corners=True) for end in ends]
        features = (torch.cat(ends, 1).permute(0, 2, 3, 1) - self.shift) * self.scale
        maps = torch.linalg.vector_norm(features - self.reconstructor(features), dim=-1)[:, None]
        maps = self.smooth(F.interpolate(maps, (self.size, self.size), mode="bilinear", align_corners=True))
        scores = F.avg_pool2d(maps, self.window, stride=1).amax((1, 2, 3))
        return scores.cpu(), maps[:, 0].cpu()

    def smooth(self, maps: torch.Tensor) -> torch.Tensor:
        """A separable Gaussian; beyond an edge its pixels are repeated."""
        margin = self.kernel.shape[-1] // 2
        maps = F.conv2d(F.pad(maps, (margin,) * 4, mode="replicate"), self.kernel)
        return F.conv2d(maps, self.kernel.transpose(2, 3))


def torch_detector(network: Network, parameters: dict[str, Any]) -> nn.Module:
    """The detector of a network whose map is the norm and whose score has no blocks, in evaluation mode."""
    if network.map_weights or network.blocks or not network.smoothing:
        raise ValueError("expected a map that is the norm and is smoothed, and a score without blocks")
    return TorchDetector(network, parameters).eval().requires_grad_(False)
