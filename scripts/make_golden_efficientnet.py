"""Write tests/golden/efficientnet_b0.json to b4.json: stage ends of timm's own EfficientNets, none of our code.

These are the networks with symmetric padding, which Keras does not have. The weights are random but fixed, each tensor
a function of its name and shape, BatchNorm's statistics included. Each file holds the names and shapes of timm's
tensors and, for one probe image and each stage end (NHWC), shape, mean, deviation and 64 fixed entries, computed in
float64. The slow tests compare whole tensors with the same reference. Needs numpy, torch and timm:

    python scripts/make_golden_efficientnet.py
"""

import json
import zlib

from make_golden_backbone import GOLDEN, _summary, probe_image, stage_ends, torch_reference
from make_golden_networks import DEVIATION, MEAN, random_state, tensor_shapes

NETWORKS = tuple(f"efficientnet_b{i}" for i in range(5))
# Even and odd lengths at different strides (72 36 18 9 5 3, 61 31 16 8 4 2): padding differs from TensorFlow's.
SIZE = (72, 61)


def random_reference(architecture: str):
    """timm's network with these weights, in evaluation mode and float64, and their names and shapes."""
    import torch

    model = torch_reference(architecture)
    shapes = tensor_shapes(model)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in random_state(shapes).items()})
    return model, shapes


def main() -> None:
    image = probe_image(*SIZE)
    for network in NETWORKS:
        model, shapes = random_reference(network)
        golden = {
            "size": SIZE,
            "crc32": zlib.crc32(image.tobytes()),
            "tensors": shapes,
            "stages": [_summary(end) for end in stage_ends(model, (image - MEAN) / DEVIATION)],
        }
        text = json.dumps(golden, separators=(",", ":")).replace('{"shape"', '\n{"shape"')
        GOLDEN.with_name(f"{network}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
