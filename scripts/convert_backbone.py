"""Write the weights of a backbone as our safetensors: folded, float32, with source, licence and sha256 as metadata.

The file needs no network, no Keras and no conversion any more; it is read by `--features.weights OUT.safetensors`:

    python scripts/convert_backbone.py tf_efficientnet_b4 OUT.safetensors [--weights keras|FILE]
"""

import argparse
import sys
from pathlib import Path

from pushpull_jax.errors import InputError
from pushpull_jax.weights import backbone_metadata, load_backbone, save_parameters


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the backbone")
    parser.add_argument("out", type=Path, help="file to write, .safetensors")
    parser.add_argument("--weights", help='"keras" or a file; default: the backbone\'s own source')
    given = parser.parse_args(arguments)
    try:
        if given.out.suffix != ".safetensors":
            raise InputError(f"{given.out}: expected a name that ends in .safetensors")
        backbone, parameters = load_backbone(given.name, weights=given.weights)
        metadata = backbone_metadata(backbone)
        save_parameters(given.out, parameters, metadata=metadata)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(f"{key}: {value}" for key, value in metadata.items()))


if __name__ == "__main__":
    main()
