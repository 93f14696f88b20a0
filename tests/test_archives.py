"""Archives that claim what they have not, and names that lead elsewhere."""

import io
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from tokgen import archives
from tokgen.data import captioned, npz
from tokgen.evaluation import made_images, references
from tokgen.interfaces import UserError
from tokgen.pretrained import parity


def header(shape, descr="|u1", fortran=False):
    """The beginning of an .npy file, nothing behind it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": fortran, "shape": shape}
    )
    return file.getvalue()


def written(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def claiming(path, size, compressed=None):
    """A small archive whose directory says that its one member has `size` bytes."""
    written(path, {"arr_0": header((8, 4, 4, 3)) + bytes(384)}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 24 : place + 28] = size.to_bytes(4, "little")
    if compressed:
        data[place + 20 : place + 24] = compressed.to_bytes(4, "little")
    path.write_bytes(data)
    return path


BILLION = 10**9
HOSTILE = {
    "a thousand million images": {"arr_0": header((BILLION, 64, 64, 3))},
    "sizes whose product wraps around": {"arr_0": header((2**32, 2**32, 1, 3))},
    "a negative size": {"arr_0": header((-1, 4, 4, 3))},
    "items without bytes": {"arr_0": header((BILLION, 4, 4, 3), "|V0")},
    "objects": {"arr_0": header((4,), "|O") + bytes(32)},
    "more bytes than its shape": {"arr_0": header((1, 4, 4, 3)) + bytes(4096)},
    "no header": {"arr_0": b"words, not numbers"},
    "a header that is a program": {"arr_0": header((1,)).replace(b"'|u1'", b"f(0) ")},
    "nothing": {"arr_0": b""},
}
READERS = {
    "archives": lambda path: archives.arrays(path),
    "samples": lambda path: npz.Archive(path),
    "references": lambda path: references.read(path),
    "parts of an evaluation": made_images.loaded_part,
    "texts": lambda path: captioned.conditions(str(path)),
    "a fixture": lambda path: parity.Folder(path.parent, "lpips"),
}


def refused(read, path):
    """The one error of a reader that takes neither time nor memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(UserError) as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 1
    return str(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_header_claims_is_held_against_the_bytes(name, reader, tmp_path):
    members = {key.replace("arr_0", "mu"): data for key, data in HOSTILE[name].items()}
    members = HOSTILE[name] if reader in ("samples", "archives") else members
    path = written(tmp_path / "case.npz", members)
    assert "case.npz" in refused(READERS[reader], path)


@pytest.mark.parametrize("reader", READERS)
def test_what_a_directory_claims_is_held_against_the_file(reader, tmp_path):
    path = tmp_path / "case.npz"
    for size, compressed in ((2**31, None), (2**31, 2**30)):
        assert "claim" in refused(READERS[reader], claiming(path, size, compressed))
    for data in (b"", b"text", b"PK\x03\x04" + bytes(40)):
        path.write_bytes(data)
        assert "case.npz" in refused(READERS[reader], path)


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """100 kB of zeros packed into a few hundred bytes stand for gigabytes."""
    monkeypatch.setattr(archives, "SMALL", 10_000)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, mu=np.zeros(100_000, np.uint8))
    assert "uncompressed" in refused(archives.arrays, path)
    np.savez(path, mu=np.zeros(100_000, np.uint8))
    assert archives.arrays(path)["mu"].shape == (100_000,)


def test_members_of_one_name_or_of_another_packing(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("a.npy", header((1,)) + b"a")
    assert "one name" in refused(archives.arrays, path)
    written(path, {"a": header((1,)) + b"a"}, zipfile.ZIP_LZMA)
    assert "numpy never uses" in refused(archives.arrays, path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(save, tmp_path):
    wanted = {
        "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "text": np.array("record"),
        "none": np.zeros((0, 3), np.int64),
        "scalar": np.float32(2.5),
    }
    save(tmp_path / "a.npz", **wanted)
    found = archives.arrays(tmp_path / "a.npz", without=("none",))
    assert set(found) == set(wanted) - {"none"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], strict=True)


ELSEWHERE = (
    *("../x.bin", "/etc/x", "a/b", "a\\b", "..", ".", "", ".hidden", "C:x", "x\0.bin", "a\nb"),
    *("-rf", "NUL", "com1.bin", "x.", "x ", "x" * 300, "ä" * 150, "\u202egnp.exe", None, 7, ["x"]),
)


@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(UserError, match="plain name of a file"):
        archives.plain(name, "its record")


@pytest.mark.parametrize("name", ["x.bin", "vq_ds16_c2i.pt", "model-00001-of-00002.safetensors"])
def test_names_of_files_are_taken(name):
    assert archives.plain(name, "its record") == name
