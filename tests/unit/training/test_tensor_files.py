"""Tensor files are safetensors, and what is read is what was written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from preftune.training.tensor_files import CHUNK, Damaged, FileSum, TensorFile, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(3.0),
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "double": torch.randn(2, generator=generator, dtype=torch.float64),
        "turned": torch.randn(4, 6, generator=generator).T,
        "none": torch.empty(0, 7),
        "large": torch.randn(CHUNK // 4 + 3, generator=generator),
    }


def test_the_safetensors_package_reads_it(tmp_path):
    expected = tensors()
    written = write_tensors(tmp_path / "file", expected)
    assert written.size == (tmp_path / "file").stat().st_size
    got = load_file(tmp_path / "file")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    save_file({k: v.contiguous() for k, v in expected.items()}, tmp_path / "theirs")
    theirs, ours = ((tmp_path / name).read_bytes() for name in ("theirs", "file"))
    length = int.from_bytes(ours[:8], "little")
    assert ours[8 + length :] == theirs[8 + int.from_bytes(theirs[:8], "little") :]


def test_tensors_are_read_into_their_places(tmp_path):
    """In place, and staged where a target is laid out otherwise or of another dtype."""
    expected = tensors()
    written = write_tensors(tmp_path / "file", expected)
    targets = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in expected.items()}
    targets["turned"] = torch.zeros(4, 6).T
    targets["half"] = torch.zeros(3, 5)
    addresses = {name: t.data_ptr() for name, t in targets.items()}
    with TensorFile(tmp_path / "file", written) as file:
        file.read_into(targets)
    assert {name: t.data_ptr() for name, t in targets.items()} == addresses
    for name, tensor in expected.items():
        assert torch.equal(targets[name], tensor.to(targets[name].dtype))


def test_another_checksum_is_damage(tmp_path):
    written = write_tensors(tmp_path / "file", {"a": torch.ones(3)})
    other = FileSum(written.size, "0" * 32)
    with pytest.raises(Damaged, match="checksum"), TensorFile(tmp_path / "file", other) as file:
        file.read_into({"a": torch.empty(3)})


def header(text: str, body: int = 4) -> bytes:
    content = text.encode()
    return len(content).to_bytes(8, "little") + content + bytes(body)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (1 << 60).to_bytes(8, "little"),
        header("[]"),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}'),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', 8),
        header('{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}'),
        header('{"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}}'),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 8),
    ],
)
def test_a_header_that_makes_no_sense_is_damage(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    file = TensorFile(tmp_path / "file", FileSum(len(content), ""))
    with pytest.raises(Damaged, match="file "), file:
        pass
