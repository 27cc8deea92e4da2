"""Damage to the store of reference log-probs: every kind is told, and none loses what was good."""

from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from preftune.batching.layout import Layout
from preftune.errors import CacheError
from preftune.model.forward import PolicyModel
from preftune.reference.build import ReferenceLogps, ShardSize, reference_logps
from preftune.reference.fingerprints import namespace_fields, namespace_key
from preftune.reference.store import ReferenceStore, StoredLogps, read_shard
from preftune.schema import Completion, TokenizedExample
from tests.examples import make_examples
from tests.tiny import tiny_model

EXAMPLES = make_examples(9)


def compute(root: Path, examples=EXAMPLES, model: PolicyModel | None = None) -> ReferenceLogps:
    return reference_logps(
        PolicyModel(tiny_model()) if model is None else model,
        examples,
        ReferenceStore(root, "ns", {}),
        layout=Layout("concatenated"),
        device=torch.device("cpu"),
        shard_size=ShardSize(tokens=200, micro_batches=2),
    )


def stored(root: Path) -> dict[str, bytes]:
    """Shards by name."""
    return {p.name: p.read_bytes() for p in (root / "reference" / "ns").glob("*.safetensors")}


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def small_store(root: Path) -> ReferenceStore:
    """Two answers in one shard, and their plan."""
    values = torch.tensor([-1.5, -0.25, -3.0]).numpy()
    store = ReferenceStore(root, "ns", {})
    entries = {b"a" * 16: StoredLogps(-1.75, values[:2]), b"b" * 16: StoredLogps(-3.0, values[2:])}
    store.write_shard(store.shard_path("p", 0), entries)
    store.write_plan("p", list(entries))
    return store


def test_a_flipped_bit_in_any_byte_of_a_shard_is_told(tmp_path):
    path = small_store(tmp_path).shard_path("p", 0)
    whole = path.read_bytes()
    assert list(read_shard(path)) == [b"a" * 16, b"b" * 16]
    for byte in range(len(whole)):
        path.write_bytes(flipped(whole, 8 * byte + byte % 8))
        with pytest.raises(CacheError, match=r"shard .*p-00000\.safetensors .*damaged.*delete"):
            read_shard(path)


def test_every_flipped_bit_of_a_plan_and_every_cut_is_told(tmp_path):
    store = small_store(tmp_path)
    path = store.folder / "p.plan"
    whole = path.read_bytes()
    damaged = [flipped(whole, bit) for bit in range(8 * len(whole))]
    damaged += [whole[:length] for length in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CacheError, match=r"plan .*p\.plan .*damaged.*delete that file"):
            store.read_plan("p")
    path.write_bytes(whole)
    assert store.read_plan("p") == [b"a" * 16, b"b" * 16]
    path.rename(store.folder / "q.plan")
    assert store.read_plan("p") is None
    with pytest.raises(CacheError, match="damaged"):  # of other rows
        store.read_plan("q")


def test_a_shard_without_a_checksum_is_no_shard(tmp_path):
    """Those of the first version had none; their namespaces are others, too."""
    path = small_store(tmp_path).shard_path("p", 0)
    save_file(load_file(path), path)
    with pytest.raises(CacheError, match="checksum"):
        read_shard(path)
    fields = namespace_fields(
        PolicyModel(tiny_model()), precision="fp32", layout="separate", device="cpu"
    )
    earlier = {key: value for key, value in fields.items() if key != "store_version"}
    assert namespace_key(fields) != namespace_key(earlier)


@pytest.mark.parametrize("length", [0, 4, 50, -1])
def test_a_cut_shard_is_told(tmp_path, length):
    compute(tmp_path)
    path = sorted((tmp_path / "reference" / "ns").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CacheError, match=f"{path.name}.*damaged.*delete"):
        compute(tmp_path)


@pytest.mark.parametrize("pattern", ["*.plan", "*-00000.safetensors", "*-00001.safetensors", "*"])
def test_what_is_deleted_is_computed_again_to_the_same_bytes(tmp_path, pattern):
    """The remedy that the errors name; other files keep their values."""
    first = compute(tmp_path)
    before = stored(tmp_path)
    assert len(before) > 2
    for path in (tmp_path / "reference" / "ns").glob(pattern):
        path.unlink()
    again = compute(tmp_path)
    assert stored(tmp_path) == before
    assert torch.equal(first.sums, again.sums)
    assert again.num_computed == {"*.plan": 0, "*": 18}.get(pattern, again.num_computed) < 19


@pytest.mark.parametrize("name", [".p-00000.safetensors.0123456789ab", "p-00000.lock"])
def test_what_a_kill_left_is_removed_unless_somebody_may_be_at_it(tmp_path, name):
    first = ReferenceStore(tmp_path, "ns", {})
    leftover = first.folder / name
    leftover.write_bytes(b"half")
    with first.deciding():
        second = ReferenceStore(tmp_path, "ns", {})
    assert leftover.exists()
    del first, second
    ReferenceStore(tmp_path, "ns", {})
    assert sorted(path.name for path in leftover.parent.iterdir()) == [
        "namespace.json",
        "namespace.lock",
        "plans.lock",
    ]


def test_two_answers_that_run_together_alike_have_their_own_values(tmp_path):
    """[1, 2] + [3] and [1] + [2, 3] are one sequence, of which other tokens are scored."""

    def row(prompt, answer):
        answers = (Completion(answer), Completion((9,)))
        return TokenizedExample("r", prompt, answers, ("chosen", "rejected"), "s", len(prompt))

    values = compute(tmp_path, [row((1, 2), (3,)), row((1,), (2, 3))])
    assert values.num_computed == 4
    assert values.sums[1, 0] < values.sums[0, 0]
