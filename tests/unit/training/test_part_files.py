"""Parts of tensors in several files: read into any other cut, by PyTorch's reader, too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from preftune.distributed.parts import Part, cut
from preftune.training.part_files import PartReader
from preftune.training.tensor_files import Damaged, write_tensors

TENSORS = {
    "weight": torch.arange(35.0).view(7, 5),
    "norm": torch.arange(3.0) + 100,
    "exp_avg/weight": torch.arange(7.0).view(7, 1) + 200,
    "step/weight": torch.tensor(4.0),
}


def write(folder, num_ranks):
    """As so many ranks would."""
    folder.mkdir()
    paths = []
    for rank in range(num_ranks):
        parts = {name: cut(tensor, rank, num_ranks) for name, tensor in TENSORS.items()}
        saved = {name: part for name, part in parts.items() if part.is_saved}
        paths.append(folder / f"model-{rank + 1:05d}-of-{num_ranks:05d}.safetensors")
        tensors = {name: part.tensor for name, part in saved.items()}
        write_tensors(paths[-1], tensors, {name: part.first for name, part in saved.items()})
    return paths


def empty(part):
    return Part(torch.full_like(part.tensor, -1.0), part.first, part.shape)


@given(writers=st.integers(1, 9), readers=st.integers(1, 9))
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path_factory, writers, readers):
    paths = write(tmp_path_factory.mktemp("parts") / "x", writers)
    for rank in range(readers):
        wanted = {name: cut(tensor, rank, readers) for name, tensor in TENSORS.items()}
        targets = {name: empty(part) for name, part in wanted.items()}
        reader = PartReader(targets)
        reader.read(paths)
        assert reader.other == []
        for name, part in wanted.items():
            assert torch.equal(targets[name].tensor, part.tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorchs_reader_reads_them(tmp_path):
    write(tmp_path / "x", 3)
    read = {name: torch.full_like(tensor, -1.0) for name, tensor in TENSORS.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path / "x")), no_dist=True)
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)


def test_whole_tensors_are_parts_too(tmp_path):
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    targets = {name: empty(cut(tensor, 1, 2)) for name, tensor in TENSORS.items()}
    PartReader(targets).read([tmp_path / "model.safetensors"])
    assert torch.equal(targets["weight"].tensor, TENSORS["weight"][4:])


def test_rows_that_no_file_holds_are_told(tmp_path):
    first, _, last = write(tmp_path / "x", 3)
    targets = {name: empty(cut(tensor, 0, 1)) for name, tensor in TENSORS.items()}
    with pytest.raises(Damaged, match="4 of the 7 rows of exp_avg/weight are there"):
        PartReader(targets).read([first, last])


def test_another_models_tensors_are_told(tmp_path):
    paths = write(tmp_path / "x", 2)
    targets = {"weight": Part(torch.zeros(7, 4), 0, (7, 4)), "bias": Part(torch.zeros(2), 0, (2,))}
    reader = PartReader(targets)
    reader.read(paths)
    assert reader.other == ["bias", "exp_avg/weight", "norm", "step/weight", "weight"]
