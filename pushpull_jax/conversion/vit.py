"""DINOv2's tensors in the naming of timm, which is that of the original checkpoints too: blocks.0.attn.qkv, and so on.

Three things are settled here, once. Each LayerScale is folded into the matrix before it. The class token gets its own
position added. The other positions, learned for 37 x 37 patches, are resampled to the network's grid by timm's rule,
bicubic with antialias. The final norm and the token of masked patches are left out on purpose.
"""

from collections.abc import Iterator

import numpy as np

from pushpull_jax.conversion.tensors import Layer, Naming, Path, Shape
from pushpull_jax.models.vit import PATCH, VisionTransformer

# Patches a side that the position embeddings of the published weights are stored for: 518 px.
STORED_GRID = 37

_DENSE = {"qkv": "attn.qkv", "project": "attn.proj", "expand": "mlp.fc1", "contract": "mlp.fc2"}
_SCALES = {"project": "ls1.gamma", "contract": "ls2.gamma"}


def bicubic_weights(length: int, wanted: int) -> np.ndarray:
    """Matrix [wanted,length] float64 that resamples an axis with the bicubic kernel, antialiased.

    Cell i of the result lies at c = (i + 1/2) s, s = length / wanted, and weighs cell j with
    k((j + 1/2 - c) / max(s, 1)), normalised to sum 1; k is Keys's cubic with a = -1/2, as torch's with antialias.
    """
    step = length / wanted
    centres = (np.arange(wanted) + 0.5) * step
    x = np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(step, 1.0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def resample_positions(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Position embeddings [h,w,D] float64 on another grid (rows, columns), bicubic with antialias."""
    if positions.shape[:2] == grid:
        return positions
    rows, columns = (bicubic_weights(n, wanted) for n, wanted in zip(positions.shape[:2], grid, strict=True))
    return np.einsum("ih,jw,hwd->ijd", rows, columns, positions, optimize=True)


def _dense_layer(path: Path, shape: Shape, name: str, scale: str | None) -> Layer:
    """Kernel [in,out] and bias of a matrix [out,in], with the LayerScale behind it folded in if it has one."""
    tensors = {f"{name}.weight": shape[::-1], f"{name}.bias": shape[1:]}
    if scale is not None:
        tensors[scale] = shape[1:]

    def leaves(kernel: np.ndarray, bias: np.ndarray, gamma: np.ndarray | float = 1.0) -> dict[Path, np.ndarray]:
        return {(*path, "kernel"): kernel.T * gamma, (*path, "bias"): bias * gamma}

    return Layer(tensors, leaves)


def _norm_layer(path: Path, shape: Shape, name: str) -> Layer:
    def leaves(scale: np.ndarray, bias: np.ndarray) -> dict[Path, np.ndarray]:
        return {(*path, "scale"): scale, (*path, "bias"): bias}

    return Layer({f"{name}.weight": shape, f"{name}.bias": shape}, leaves)


def _embedding(network: VisionTransformer) -> Iterator[Layer]:
    """The patches' convolution as a matrix over their pixels, the class token, and the positions."""
    width = network.width

    def patch(kernel: np.ndarray, bias: np.ndarray) -> dict[Path, np.ndarray]:
        return {("patch", "kernel"): kernel.transpose(2, 3, 1, 0).reshape(-1, width), ("patch", "bias"): bias}

    def tokens(token: np.ndarray, positions: np.ndarray) -> dict[Path, np.ndarray]:
        stored = positions[0, 1:].reshape(STORED_GRID, STORED_GRID, width)
        resampled = resample_positions(stored, network.grid).reshape(-1, width)
        return {("class_token",): token[0, 0] + positions[0, 0], ("positions",): resampled}

    yield Layer({"patch_embed.proj.weight": (width, 3, PATCH, PATCH), "patch_embed.proj.bias": (width,)}, patch)
    yield Layer({"cls_token": (1, 1, width), "pos_embed": (1, 1 + STORED_GRID**2, width)}, tokens)


def _layers(network: VisionTransformer, shapes: dict[Path, Shape], epsilon: float) -> Iterator[Layer]:
    yield from _embedding(network)
    for path, shape in shapes.items():
        if path[0] == "patch" or path[-1] not in ("kernel", "scale"):
            continue
        block, layer, _ = path
        # Ours count from 1, as the stages do, theirs from 0.
        prefix = f"blocks.{int(block.removeprefix('block_')) - 1}."
        if path[-1] == "scale":
            yield _norm_layer(path[:-1], shape, prefix + layer)
        else:
            scale = _SCALES.get(layer)
            yield _dense_layer(path[:-1], shape, prefix + _DENSE[layer], scale and prefix + scale)


DINOV2 = Naming(
    name="DINOv2 in timm",
    sign="patch_embed.",
    left_out=r"norm\.(weight|bias)|mask_token",
    layers=_layers,
)
