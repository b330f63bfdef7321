# SPDX-License-Identifier: Apache-2.0
"""TorchScript archives: tensors by the names of the state dict, bit for bit, and refusals without running code."""

import pickle
import zipfile

import numpy as np
import pytest

from lionjax.convert.io.reader import open_weights
from lionjax.core.types import UserError

torch = pytest.importorskip("torch")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        self.scale = torch.nn.Parameter(torch.tensor(2.5, dtype=torch.bfloat16))
        self.register_buffer("table", torch.arange(12).reshape(3, 4).T)  # not contiguous
        self.number, self.small = 3, torch.nn.Parameter(torch.randn(2, 2).half())

    def forward(self, x):
        return self.inner(x)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    net, file = Net(), tmp_path_factory.mktemp("archive") / "net.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.trace(net, torch.zeros(1, 3)).save(str(file))
    return net, file


def test_tensors_have_the_names_and_bits_of_the_state_dict(archive):
    net, file = archive
    tensors = open_weights(file)
    assert tensors.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert str(tensors[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(tensors[name].astype(np.float64), tensor.double().numpy())


def rewritten(file, target, changes):
    """A copy of an archive with other contents of some members; None leaves a member out."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = changes.get(info.filename.split("/", 1)[1], old.read(info.filename))
            if content is not None:
                new.writestr(info.filename, content)
    return target


class Evil:
    def __reduce__(self):
        return print, ("code of the file ran",)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"data.pkl": pickle.dumps(Evil(), 2)}, "it holds __builtin__.print, no tensor"),
        ({"data.pkl": b"\x80\x02junk"}, "is damaged"),
        ({"data.pkl": None}, "has no readable data.pkl"),
        ({"data/0": b""}, "is compressed or cut short"),
        ({"data.pkl": pickle.dumps([1], 2)}, "holds a list, no module"),
    ],
)
def test_other_contents_are_refused_and_not_run(archive, tmp_path, capsys, changes, problem):
    with pytest.raises(UserError, match=problem):
        open_weights(rewritten(archive[1], tmp_path / "bad.pt", changes))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["name", "version"])
def test_a_damaged_zip_directory_is_one_sentence(tmp_path, damage):
    file = tmp_path / "m.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("\u00e9/data.pkl", b"")
    data = bytearray(file.read_bytes())
    start = data.rindex(b"PK\x01\x02")
    if damage == "name":  # no UTF-8
        place = data.index(b"\xc3\xa9", start)
        data[place : place + 2] = b"\x80\x80"
    else:  # of the program that can extract it
        data[start + 6] = 64
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        open_weights(file)
