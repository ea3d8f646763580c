"""What a pickle may hold is seen before it is unpickled: names, lengths of storages, and how much it would be."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning.reading.opcodes import Box, _check_tensor, _Storage
from peft_lightning.reading.pickled import check_pickled, read_pickled

CONTENT: dict[str, Any] = {
    "state_dict": OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(4, dtype=torch.bfloat16)),
    "parameter": torch.nn.Parameter(torch.randn(3, 2).t()),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 5),
    "mask": torch.tensor([True, False]),
    "plain": {"x": [1, 2.5, None, True, "text", (1, (2,))], "size": torch.Size([1, 2]), "dtype": torch.float32},
    "large": 2**70,
}


def saved(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def rewritten(path: Path, change: Any) -> None:
    """Write an archive again with one file changed."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_comes_back(zipped: bool, tmp_path: Path) -> None:
    found = read_pickled(saved(tmp_path / "x.bin", CONTENT, zipped))
    assert found.keys() == CONTENT.keys() and found["plain"] == CONTENT["plain"] and found["large"] == 2**70
    for name in ("parameter", "scalar", "empty", "mask"):
        torch.testing.assert_close(found[name], CONTENT[name], rtol=0, atol=0)
    for name, tensor in CONTENT["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_state_of_a_module_and_its_optimizer(zipped: bool, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": module.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "rng": torch.get_rng_state(),
    }
    found = read_pickled(saved(tmp_path / "x.ckpt", content, zipped))
    torch.testing.assert_close(found["state_dict"], content["state_dict"], rtol=0, atol=0)


class Evil:
    """Would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_code_is_refused_before_torch_sees_it(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    if form == "bare":
        path.write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    else:
        saved(path, {"a": Evil(tmp_path / "ran")}, form == "zip")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(ValueError, match=r"names pathlib|names __builtin__"):
        read_pickled(path)
    assert not (tmp_path / "ran").exists()


def small_storage(content: bytes, old: int, new: int) -> bytes:
    """The same pickle with another whole number of one byte somewhere."""
    assert content.count(b"K" + bytes([old])) == 1
    return content.replace(b"K" + bytes([old]), b"K" + bytes([new]))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_larger_than_its_storage(zipped: bool, tmp_path: Path) -> None:
    """torch itself takes the memory, in the older form, before it finds out."""
    tensor = torch.arange(77.0)[:33].clone()
    path = saved(tmp_path / "x.bin", {"a": tensor.as_strided((7, 3), (5, 1))}, zipped)
    if zipped:
        rewritten(path, lambda name, c: small_storage(c, 7, 99) if name.endswith("data.pkl") else c)
    else:
        path.write_bytes(small_storage(path.read_bytes(), 7, 99))
    with pytest.raises(ValueError, match=r"a tensor of shape \(99, 3\) in a storage of 33 numbers"):
        read_pickled(path)


def test_a_tensor_that_repeats_one_number(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"a": torch.ones(1).expand(10**12)})
    with pytest.raises(ValueError, match="a tensor of shape .1000000000000,. in a storage of 1 numbers"):
        check_pickled(path)


def test_a_shape_whose_product_would_take_for_ever() -> None:
    huge = 1 << 62
    with pytest.raises(ValueError, match="a tensor of damaged shape"):
        _check_tensor(_Storage(4), 0, Box([huge] * 64), Box([0] * 64))


def test_an_archive_that_is_packed_or_lies_about_its_sizes(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"a": torch.zeros(1_000_000)})
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="entries are larger than itself; torch packs nothing"):
        read_pickled(path)
    saved(path, {"a": torch.zeros(10)})
    rewritten(path, lambda name, content: content[:-4] if name.endswith("data/0") else content)
    with pytest.raises(ValueError, match="the storage '0' has not the 40 bytes"):
        read_pickled(path)


def nested(opcodes: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes + b".")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"]q\x00(h\x00h\x00e", "holds itself"),
        (b"]q\x000]q\x01h\x00a0h\x00h\x01a", "with POP"),
        (b"]q\x00]q\x01h\x00ah\x00h\x01a", "changes after its use"),
        (b"K\x01\x85q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60)), "too many values"),
        (b"]" * 3000 + b"a" * 2999, "more than 100 deep"),
        (b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R", "names os.system"),
        (b"\x8b\xff\xff\xff\x7f1", "not enough data"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "damaged|calls"),
        (b"h\x05", "damaged"),
        (b"\x8b\x00\x04\x00\x00" + b"\x01" * 1024, r"a number of 8,185 bits"),
        (b"e", "without a mark"),
    ],
)  # fmt: skip
def test_a_pickle_that_is_no_tensors_and_plain_containers(opcodes: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(nested(opcodes))
    with pytest.raises(ValueError, match=message):
        check_pickled(tmp_path / "x.bin")


def test_every_shorter_file_is_damaged(tmp_path: Path) -> None:
    for zipped in (True, False):
        whole = saved(tmp_path / "x.bin", {"a": torch.ones(4), "b": [1, 2]}, zipped).read_bytes()
        for length in range(0, len(whole), 7):
            (tmp_path / "x.bin").write_bytes(whole[:length])
            with pytest.raises(ValueError):
                read_pickled(tmp_path / "x.bin")
