"""Files of weights: what PyTorch wrote, read alike; what is no data, never run."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion_jax.errors import ConfigError
from diffusion_jax.interop.pickled_data import Malformed, decode
from diffusion_jax.interop.weight_files import read_tensors

RECORDED = Path(__file__).parents[1] / "golden" / "features"
FORMS = ["tensors_zip.pth", "tensors_stream.pth"]


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def as_zip(path, head: bytes, records=None, **options) -> str:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", head)
        for name, data in (records or {}).items():
            archive.writestr(f"archive/{name}", data)
    return str(path)


def integer(value: int) -> bytes:
    number = pickle.encode_long(value)
    return b"\x8a" + bytes([len(number)]) + number


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def nested(doublings: int) -> bytes:
    """A tuple of two of a tuple of two of ..., each twice the same one: 2**doublings numbers."""
    return b"K\x01\x85" + b"q\x00h\x00\x86" * doublings


def stored(kind=b"ctorch\nFloatStorage\n", key=None, count=6) -> bytes:
    key = text("0") if key is None else key
    return tuple_of(text("storage"), kind, key, text("cpu"), integer(count), b"N")


def tensor_head(size, stride, *, offset=0, count=6, kind="Float", names=("w",)) -> bytes:
    """A pickle, instruction by instruction, of {"w": a tensor at this place of storage 0}."""
    storage = stored(f"ctorch\n{kind}Storage\n".encode(), count=count)
    places = [tuple_of(*map(integer, part)) for part in (size, stride)]
    arguments = tuple_of(storage + b"Q", integer(offset), *places, b"\x89", b"N")
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return b"\x80\x02}" + b"".join(text(name) + tensor + b"s" for name in names) + b"."


def as_stream(path, head: bytes, data: bytes, *, version=None, keys=None, count=6) -> str:
    """The older form, of one storage."""
    number, system = (pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, {"little_endian": True}))
    version = pickle.dumps(1001, 2) if version is None else version
    keys = pickle.dumps(["0"], 2) if keys is None else keys
    path.write_bytes(number + version + system + head + keys + struct.pack("<q", count) + data)
    return str(path)


def test_hand_written_tensor_is_read(tmp_path):
    data = np.arange(6, dtype=np.float32)
    path = as_zip(tmp_path / "w.pth", tensor_head((2, 2), (3, 1), offset=1), {"data/0": data})
    np.testing.assert_array_equal(read_tensors(path)["w"], [[1, 2], [4, 5]])


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_tensor_reads_as_pytorch_says(form):
    expected = np.load(RECORDED / "tensors.npz")
    found = read_tensors(RECORDED / form)
    assert list(found) == expected.files
    for name in expected.files:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert found["transposed"].shape == (4, 2, 3)
    assert found["scalar"].shape == ()
    assert found["bfloat16"].dtype == found["float16"].dtype == np.float32


def test_safetensors_of_every_float(tmp_path):
    path = tmp_path / "w.safetensors"
    values = np.linspace(-3, 3, 12).reshape(3, 4)
    kinds = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": jnp.bfloat16}
    arrays = {name: values.astype(dtype) for name, dtype in kinds.items()}
    head, data = {}, b""
    for name, array in arrays.items():
        ends = [len(data), len(data) + array.nbytes]
        head[name] = {"dtype": name.upper(), "shape": [3, 4], "data_offsets": ends}
        data += array.tobytes()
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = read_tensors(path)
    assert {name: array.dtype.name for name, array in found.items()} == {
        "f32": "float32",
        "f64": "float64",
        "f16": "float32",
        "bf16": "float32",
    }
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array.astype(found[name].dtype))


def test_a_length_that_begins_like_a_pickle(tmp_path):
    """A header of safetensors so long that the file begins with bytes 80 02, as pickles do."""
    tensors, path = {"w": np.arange(6, dtype=np.float32)}, tmp_path / "w"
    for length in range(480, 640, 8):
        save_file(tensors, path, metadata={"note": "x" * length})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    np.testing.assert_array_equal(read_tensors(path)["w"], tensors["w"])


def test_form_is_told_by_the_content(tmp_path):
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "w.pth")
    np.testing.assert_array_equal(read_tensors(tmp_path / "w.pth")["w"], np.ones(3))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_pickle_calls_is_named_and_never_called(tmp_path, protocol, wrapped):
    trace = tmp_path / "trace"
    evil = Calls(os.system, f"touch {trace}")
    head = pickle.dumps({"state_dict": {"w": evil}} if wrapped else evil, protocol)
    path = as_zip(tmp_path / "evil.pth", head)
    with pytest.raises(ConfigError, match=r"evil\.pth: holds (posix|nt)\.system; ") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    pickle.loads(head)
    assert trace.exists(), "the attack itself does not work"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (pickle.dumps(Calls(eval, "1 + 1")), "builtins.eval"),
        (pickle.dumps(Path("x")), "pathlib."),
        (pickle.dumps(np.float64(3)), "numpy"),
        (pickle.dumps(np.ones(3)), "numpy"),
        (b"(S'1'\nios\nsystem\n.", "INST"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x05R.", "OrderedDict"),
        (b"\x80\x02]}b.", "attributes of a list"),
        (b"\x80\x02K\x01K\x02\x85R.", "a call of int"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "no storage"),
    ],
)
def test_anything_but_tensors_and_containers_is_refused(tmp_path, head, name):
    path = as_zip(tmp_path / "w.pth", head)
    with pytest.raises(ConfigError, match=r"^[^\n]*w\.pth: [^\n]*$") as caught:
        read_tensors(path)
    assert name in str(caught.value)


def test_older_form_refuses_too(tmp_path):
    trace = tmp_path / "trace"
    evil = pickle.dumps(Calls(os.system, f"touch {trace}"), 2)
    recorded = (RECORDED / "tensors_stream.pth").read_bytes()
    stream = io.BytesIO(recorded)
    for _ in range(3):
        pickle.load(stream)
    (tmp_path / "w.pth").write_bytes(recorded[: stream.tell()] + evil)
    with pytest.raises(ConfigError, match=r"holds (posix|nt)\.system"):
        read_tensors(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(evil)
    with pytest.raises(ConfigError, match=r"holds (posix|nt)\.system"):
        read_tensors(tmp_path / "w.pth")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"size": (7,), "stride": (1,)}, "beyond storage 0"),
        ({"size": (2, 2), "stride": (5, 1)}, "beyond storage 0"),
        ({"size": (1,), "stride": (1,), "offset": 6}, "beyond storage 0"),
        ({"size": (10**9,), "stride": (0,)}, "tensors of 4000000000 bytes in storages of 24"),
        ({"size": (0, 2**70), "stride": (1, 1)}, "Maximum allowed dimension"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "number of dimensions"),
        ({"size": (1,), "stride": (2**70,)}, "too large"),
        ({"size": (1,), "stride": (1,), "offset": -1}, "without a place"),
        ({"size": (2,), "stride": (-1,)}, "without a place"),
        ({"size": (2,), "stride": (1, 1)}, "without a place"),
        ({"size": (2,), "stride": (1,), "count": 5}, "cut short"),
        ({"size": (2,), "stride": (1,), "kind": "Complex"}, "torch.ComplexStorage"),
    ],
)
def test_no_tensor_reads_outside_its_storage(tmp_path, place, reason):
    data, count = np.zeros(6, np.float32).tobytes(), place.get("count", 6)
    head = tensor_head(**place)
    as_zip(tmp_path / "zip.pth", head, {"data/0": data})
    as_stream(tmp_path / "stream.pth", head, data[: 4 * count - 4 * (count == 5)], count=count)
    for name in ("zip", "stream"):
        with pytest.raises(ConfigError, match=reason) as caught:
            read_tensors(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)


def test_a_small_file_does_not_grow_large(tmp_path):
    """Each tensor repeats its storage only so often that it might be an honest expansion."""
    count = 2**14
    head = tensor_head((64, count), (0, 1), count=count, names=map(str, range(40)))
    data = bytes(4 * count)
    as_zip(tmp_path / "zip.pth", head, {"data/0": data})
    as_stream(tmp_path / "stream.pth", head, data, count=count)
    for name in ("zip", "stream"):
        with pytest.raises(ConfigError, match=r"tensors of \d+ bytes in storages of 65536"):
            read_tensors(tmp_path / f"{name}.pth")


def test_neither_hash_nor_text_of_nested_tuples_is_asked_for(tmp_path):
    """Those of wide ones take for ever, those of deep ones overflow the stack of the process."""
    start, what, end = b"\x80\x02", nested(60), b"."
    pair = b"ccollections\nOrderedDict\n" + tuple_of(b"]" + tuple_of(what, b"K\x01") + b"a") + b"R"
    heads = [
        start + b"}" + what + b"K\x01s" + end,
        start + b"}(" + what + b"K\x01u" + end,
        start + b"(" + what + b"K\x01d" + end,
        b"\x80\x04\x8f(" + what + b"\x90" + end,
        start + pair + end,
        start + what + b"K\x01\x85R" + end,
        start + stored(kind=what) + b"Q" + end,
        start + stored(key=what) + b"Q" + end,
        b"\x80\x04" + what + text("x") + b"\x93" + end,
    ]
    heads.append(start + b"}(t" + b"\x85" * 300_000 + b"K\x01s" + end)
    paths = [as_zip(tmp_path / f"{number}.pth", head) for number, head in enumerate(heads)]
    head, data = tensor_head((1,), (1,)), np.zeros(6, np.float32).tobytes()
    for name, part in (("version", what), ("keys", b"]" + what + b"a")):
        changed = {name: start + part + end}
        paths.append(as_stream(tmp_path / f"{name}.pth", head, data, **changed))
    for path in paths:
        with pytest.raises(ConfigError, match=r"^[^\n]{1,400}$"):
            read_tensors(path)


def test_texts_of_a_file_are_shown_in_one_short_line(tmp_path):
    long = "a\nb" * 10_000
    heads = [
        pickle.dumps({long: 3}, 2),
        b"\x80\x04" + text(long) + text("x") + b"\x93.",
        b"\x80\x02" + stored(key=text(long), count=7) + b"Q.",
    ]
    for head in heads:
        with pytest.raises(ConfigError, match=r"^[^\n]{1,400}$"):
            read_tensors(as_zip(tmp_path / "w.pth", head))


def test_archives_that_are_not_pytorchs(tmp_path):
    head = tensor_head((2,), (1,))
    data = np.zeros(6, np.float32).tobytes()
    cases = {
        "no record": as_zip(tmp_path / "a.pth", head),
        "compressed": as_zip(
            tmp_path / "b.pth", head, {"data/0": data}, compression=zipfile.ZIP_DEFLATED
        ),
        "TorchScript": as_zip(tmp_path / "c.pth", head, {"data/0": data, "constants.pkl": b""}),
        "big-endian": as_zip(tmp_path / "d.pth", head, {"data/0": data, "byteorder": b"big"}),
    }
    np.savez(tmp_path / "e.npz", x=np.ones(3))
    cases["without a data.pkl"] = str(tmp_path / "e.npz")
    for reason, path in cases.items():
        with pytest.raises(ConfigError, match=reason) as caught:
            read_tensors(path)
        assert str(caught.value).startswith(path)


@pytest.mark.parametrize("form", FORMS)
def test_every_cut_and_many_flips_end_in_one_line(tmp_path, form):
    whole = (RECORDED / form).read_bytes()
    path = tmp_path / "w.pth"
    for end in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match=r"^[^\n]*w\.pth: [^\n]*$"):
            read_tensors(path)
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole), size=150):
        path.write_bytes(whole[:place] + bytes([rng.integers(256)]) + whole[place + 1 :])
        # What is flipped may be a number, a counter or a part of a name that nothing reads.
        with contextlib.suppress(ConfigError):
            read_tensors(path)


def test_damaged_safetensors_and_missing_files(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": np.ones(30, np.float32)}, path)
    whole = path.read_bytes()
    for end in (0, 5, 9, 40, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match=r"w\.safetensors: damaged"):
            read_tensors(path)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ConfigError, match="neither safetensors nor written by torch"):
        read_tensors(path)
    with pytest.raises(ConfigError, match=r"nowhere: No such file"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_tensors(tmp_path)


def test_what_holds_no_state_dict(tmp_path):
    cases = {
        "a list instead of a state dict": [1, 2],
        "a int under 'epoch' instead of a tensor": {"epoch": 3},
        "a dict under 'encoder' instead of a tensor": {"encoder": {}},
        "holds no tensors": {"model": collections.OrderedDict()},
    }
    for reason, tree in cases.items():
        path = as_zip(tmp_path / "w.pth", pickle.dumps(tree, 2))
        with pytest.raises(ConfigError, match=reason):
            read_tensors(path)


def test_dictionary_that_holds_itself_ends(tmp_path):
    tree = {}
    tree["model"] = tree
    path = as_zip(tmp_path / "w.pth", pickle.dumps(tree, 2))
    with pytest.raises(ConfigError, match="a dict under 'model'"):
        read_tensors(path)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_decoded_as_pickle_does(protocol):
    plain = {
        "numbers": [0, -1, 300, 1 << 40, -(1 << 70), 1.5, True, None],
        2: ("x", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "many": list(range(2000)),
        "text": "é" * 300,
    }
    plain["again"] = plain["many"]
    stream = io.BytesIO(pickle.dumps(plain, protocol) + b"behind")
    nothing = {"known": lambda _: False, "call": print, "persistent": print}
    found = decode(stream, **nothing)
    assert found == plain
    assert found["again"] is found["many"]
    assert stream.read() == b"behind"
    with pytest.raises(Malformed):
        decode(io.BytesIO(b"}"), **nothing)
