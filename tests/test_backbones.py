"""The table of backbones: what belongs to each weight family, the input's normalisation, stages and sizes refused."""

import dataclasses
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.backbones import BACKBONES, EFFICIENTNET_LITE0, HubFile, find_backbone
from pushpull_jax.errors import InputError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
ALL_STAGES = (1, 2, 3, 4, 5)
# Golden: parameters of our trunks, BatchNorm and LayerScale folded. test_efficientnet derives its own from published
# totals; the others are those of the tensors of timm's networks that the strict conversions account for.
PARAMETERS = {
    "efficientnet_lite0": 2_939_120,
    "tf_efficientnet_b0": 3_575_660,
    "tf_efficientnet_b1": 6_071_280,
    "tf_efficientnet_b2": 7_170_186,
    "tf_efficientnet_b3": 10_061_224,
    "tf_efficientnet_b4": 16_681_408,
    "efficientnet_b0": 3_575_660,
    "efficientnet_b1": 6_071_280,
    "efficientnet_b2": 7_170_186,
    "efficientnet_b3": 10_061_224,
    "efficientnet_b4": 16_681_408,
    "resnet18": 11_171_712,
    "resnet34": 21_276_160,
    "wide_resnet50_2": 66_800_128,
    "dinov2_vits14": 21_644_544,
    "dinov2_vitb14": 85_756_416,
    "pixels": 0,
}


def parameter_count(backbone):
    """Counted with the plain convolution, which is traced more quickly and has the same parameters."""
    plain = backbone.network.clone(depthwise="conv") if hasattr(backbone.network, "depthwise") else backbone.network
    leaves = jax.tree.leaves(dataclasses.replace(backbone, network=plain).abstract_parameters())
    assert {leaf.dtype for leaf in leaves} <= {jnp.dtype(jnp.float32)}
    return sum(leaf.size for leaf in leaves)


def test_parameter_counts_are_the_golden_ones():
    assert {name: parameter_count(backbone) for name, backbone in BACKBONES.items()} == PARAMETERS


def test_names_are_those_of_the_table():
    assert list(BACKBONES) == list(PARAMETERS)
    assert all(backbone.name == name for name, backbone in BACKBONES.items())
    assert len({backbone.origin for backbone in BACKBONES.values()}) == len(BACKBONES)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if "efficientnet_b" in name])
def test_padding_epsilon_and_preprocessing_belong_to_the_weight_family(name):
    """timm's default_cfgs and BatchNorm settings for these tags; ImageNet's 0.485, 0.229 and so on, times 255."""
    backbone = BACKBONES[name]
    of_tensorflow = name.startswith("tf_")
    assert backbone.network.padding == ("tf" if of_tensorflow else "symmetric")
    assert backbone.epsilon == (1e-3 if of_tensorflow else 1e-5)
    np.testing.assert_allclose(backbone.mean, [123.675, 116.28, 103.53])
    np.testing.assert_allclose(backbone.deviation, [58.395, 57.12, 57.375])
    assert backbone.licence == "Apache-2.0"
    assert [naming.name for naming in backbone.namings] == (
        ["timm", "EfficientNet-PyTorch", "keras.applications"] if of_tensorflow else ["timm"]
    )
    assert backbone.keras == (f"EfficientNetB{name[-1]}" if of_tensorflow else None)
    tag = (
        "aa_in1k" if of_tensorflow else dict(zip("01234", "ra ft ra ra2 ra2".split(), strict=True))[name[-1]] + "_in1k"
    )
    assert backbone.origin == HubFile(f"timm/{name}.{tag}", "model.safetensors")


def table_of_the_docs():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d ]+) \|", DOCS.read_text(), re.MULTILINE)
    return {name: (int(count.replace(",", "")), tuple(map(int, widths.split()))) for name, count, widths in rows}


def test_the_documentation_tells_of_every_backbone():
    found = {name: (parameter_count(b), tuple(b.network.stage_widths)) for name, b in BACKBONES.items()}
    assert table_of_the_docs() == found


class Identity(nn.Module):
    """Stands in for a network of five stages: returns what it is given, and its parameters."""

    stage_widths = (3,) * 5

    def apply(self, variables, images, stages):
        return images, variables, stages


def test_input_of_lite0_is_scaled_from_0_255():
    backbone = dataclasses.replace(EFFICIENTNET_LITE0, network=Identity())
    images = np.array([0, 127, 255], np.float32)[None, :, None, None] * np.ones((1, 3, 2, 3), np.float32)
    got, variables, stages = backbone.stage_ends({"a": 1}, jnp.asarray(images), (2, 3))
    # (x - 127) / 128, exact in float32.
    np.testing.assert_array_equal(got[0, :, 0, 0], np.array([-127 / 128, 0, 1], np.float32))
    np.testing.assert_array_equal(got, np.broadcast_to(got[:, :, :1, :1], images.shape))
    assert (variables, stages) == ({"params": {"a": 1}}, (2, 3))


def test_input_is_normalised_channel_by_channel_in_its_own_dtype():
    numbers = {"mean": (0.0, 1.0, 2.0), "deviation": (1.0, 2.0, 4.0)}
    backbone = dataclasses.replace(EFFICIENTNET_LITE0, network=Identity(), **numbers)
    got, _, _ = backbone.stage_ends({}, jnp.full((2, 1, 1, 3), 10, jnp.bfloat16), ALL_STAGES)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[1, 0, 0].astype(np.float32), [10.0, 4.5, 2.0])


def test_integer_images_are_refused_rather_than_wrapped_around():
    with pytest.raises(ValueError, match="uint8"):
        EFFICIENTNET_LITE0.stage_ends({}, np.zeros((1, 32, 32, 3), np.uint8), (1,))


@pytest.mark.parametrize("stages", [(), (0,), (1, 6), (-1,)])
def test_stages_there_are_not_are_refused(stages):
    backbone = dataclasses.replace(EFFICIENTNET_LITE0, network=Identity())
    with pytest.raises(InputError, match=re.escape(f"efficientnet_lite0: stages must be some of 1 to 5, got {stages}")):
        backbone.stage_ends({}, np.zeros((1, 8, 8, 3), np.float32), stages)
    backbone.check_stages((5, 1))


def test_images_of_another_size_are_refused_where_the_network_is_built_for_one():
    backbone = dataclasses.replace(EFFICIENTNET_LITE0, network=Identity(), image_size=252)
    for shape in ((1, 256, 256, 3), (1, 252, 256, 3), (1, 256, 252, 3)):
        with pytest.raises(InputError, match=f"built for images of 252x252 px, got {shape[1]}x{shape[2]}; .* to 252"):
            backbone.stage_ends({}, np.zeros(shape, np.float32), (1,))
    images, _, _ = backbone.stage_ends({}, np.full((1, 252, 252, 3), 127, np.float32), (1,))
    assert not images.any()


def test_unknown_backbone_offers_the_nearest():
    with pytest.raises(InputError, match=r"no backbone 'tf_eficientnet_b4'; did you mean tf_efficientnet_b4\?"):
        find_backbone("tf_eficientnet_b4")


def test_a_tree_of_shapes_is_the_callers_own():
    tree = EFFICIENTNET_LITE0.abstract_parameters()
    tree["stem"].clear()
    assert EFFICIENTNET_LITE0.abstract_parameters()["stem"]
