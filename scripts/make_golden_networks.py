"""Write tests/golden/NETWORK.json for ResNets and DINOv2: stage ends of timm's networks by torch, none of our code.

The weights are random but fixed, each tensor a function of its name and shape, BatchNorm's statistics and LayerScale
included. Each file holds the names and shapes of timm's tensors and, for one probe image and each stage end (NHWC),
shape, mean, deviation and 64 fixed entries, computed in float64. The slow tests compare whole tensors with the same
reference. Needs numpy, torch and timm:

    python scripts/make_golden_networks.py
"""

import json
import zlib
from pathlib import Path

import numpy as np
from make_golden_backbone import _summary, _timm, probe_image

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
# timm's names of the networks.
ARCHITECTURES = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "wide_resnet50_2": "wide_resnet50_2",
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
}
# Of the golden files; sizes that tell rows from columns. DINOv2's positions are resampled from 37x37 to 4x6 there.
SIZES = {"resnet18": (64, 96), "resnet34": (64, 96), "wide_resnet50_2": (64, 96), "dinov2_vits14": (56, 84)}
# ImageNet's, on 0..255: the inputs of all of these networks are (x - mean) / deviation.
MEAN = np.array([0.485, 0.456, 0.406]) * 255
DEVIATION = np.array([0.229, 0.224, 0.225]) * 255


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a network in timm's naming, float32 (int64 for a counter), uniform in a range that its name decides.

    Variances are small enough for the epsilons of BatchNorm and LayerNorm to show at 1e-4. Raw bits of PCG64 are the
    same in every version of NumPy.
    """
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    size = int(np.prod(shape))
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(-(-size // 4))
    unit = (raw.astype("<u8").view("<u2")[:size].astype(np.float32) + 0.5) / 65536
    low, high = _bounds(name, shape)
    return (np.float32(low) + np.float32(high - low) * unit).reshape(shape)


def _bounds(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("running_var"):
        return 0.005, 0.05
    if name.endswith("gamma"):
        return 0.2, 1.0
    if len(shape) == 1 and name.endswith("weight"):
        return 0.5, 1.5
    if name in ("cls_token", "pos_embed", "patch_embed.proj.bias"):
        return -0.05, 0.05
    if len(shape) == 1:
        return -0.2, 0.2
    deviation = 1 / np.sqrt(np.prod(shape[1:]))
    if len(shape) == 4:
        deviation *= 0.02 if name.startswith("patch_embed") else 0.15
    return -np.sqrt(3) * deviation, np.sqrt(3) * deviation


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """All tensors of a network."""
    return {name: random_tensor(name, tuple(shape)) for name, shape in shapes.items()}


def torch_reference(network: str):
    """timm's network with these weights, in evaluation mode and float64; DINOv2 takes images of any size."""
    import torch

    options = {"img_size": 518, "dynamic_img_size": True} if network.startswith("dinov2") else {}
    model = _timm().create_model(ARCHITECTURES[network], **options)
    state = random_state(tensor_shapes(model))
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in state.items()})
    return model.eval().double()


def tensor_shapes(model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a torch model."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def stage_ends(model, image: np.ndarray) -> list[np.ndarray]:
    """All stage ends [h,w,C] float64 of an image [H,W,3] in 0..255."""
    import torch

    inputs = ((image - MEAN) / DEVIATION).transpose(2, 0, 1)[None]
    with torch.no_grad():
        ends = model.forward_intermediates(torch.from_numpy(inputs), intermediates_only=True)
    return [end[0].permute(1, 2, 0).numpy() for end in ends]


def main() -> None:
    for network, size in SIZES.items():
        model, image = torch_reference(network), probe_image(*size)
        golden = {
            "size": size,
            "crc32": zlib.crc32(image.tobytes()),
            "tensors": tensor_shapes(model),
            "stages": [_summary(end) for end in stage_ends(model, image)],
        }
        text = json.dumps(golden, separators=(",", ":")).replace('{"shape"', '\n{"shape"')
        (GOLDEN / f"{network}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
