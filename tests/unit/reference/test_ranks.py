"""The reference pass over several ranks: the bytes of one, by as many forwards on each."""

import threading
import time
from pathlib import Path

import pytest
import torch

from preftune.batching.layout import Layout
from preftune.errors import CacheError, ModelError
from preftune.reference.build import ShardSize, reference_logps
from preftune.reference.copies import copy_to_file_systems
from preftune.reference.store import ReferenceStore
from tests.examples import make_examples
from tests.policies import CountingModel
from tests.ranks import on_ranks

EXAMPLES = make_examples(30)
NUM_ANSWERS = 60


def passes(root, number, *, models=None, examples=EXAMPLES, said=None, forwards_together=False):
    """What each of `number` ranks gets of one pass; `root` may differ by rank."""
    models = models or [CountingModel() for _ in range(number)]
    roots = root if isinstance(root, list) else [root] * number

    def work(ranks):
        ranks.forwards_together = forwards_together
        return reference_logps(
            models[ranks.rank],
            examples,
            ReferenceStore(roots[ranks.rank], "ns", {}),
            layout=Layout("concatenated"),
            device=torch.device("cpu"),
            shard_size=ShardSize(tokens=200, micro_batches=3),
            ranks=ranks,
            say=(lambda text: None) if said is None else said.append,
        )

    return on_ranks(number, work)


def files(root: Path) -> dict[str, bytes]:
    folder = root / "reference" / "ns"
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".plan")
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Files and sums of one rank's pass, and its forwards."""
    root = tmp_path_factory.mktemp("straight")
    model = CountingModel()
    (values,) = passes(root, 1, models=[model])
    assert values.num_computed == NUM_ANSWERS
    assert len(files(root)) > 5
    return files(root), values.sums, model.num_forwards


@pytest.mark.parametrize("number", [2, 3, 5])
def test_several_ranks_write_the_bytes_of_one(tmp_path, straight, number):
    expected, sums, num_forwards = straight
    models = [CountingModel() for _ in range(number)]
    outcomes = passes(tmp_path, number, models=models)
    assert files(tmp_path) == expected
    for values in outcomes:
        assert torch.equal(values.sums, sums)
        assert (values.num_computed, values.num_reused) == (NUM_ANSWERS, 0)
    # Every rank makes as many forwards as the others: some engines wait in each for all ranks.
    (each,) = {model.num_forwards for model in models}
    assert num_forwards <= each * number < num_forwards + number * len(expected)
    again = [CountingModel(fail_at=1, error=ModelError) for _ in range(number)]
    for values in passes(tmp_path, number, models=again):
        assert (values.num_computed, values.num_reused) == (0, NUM_ANSWERS)
        assert torch.equal(values.sums, sums)


@pytest.mark.parametrize("fail_at", [1, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_all_and_the_next_pass_ends_in_the_same_bytes(
    tmp_path, straight, rank, fail_at
):
    models = [CountingModel(fail_at if number == rank else None, ModelError) for number in range(2)]
    errors = passes(tmp_path, 2, models=models)
    assert {str(e) for e in errors} == {f"on rank {rank} of 2 (host host0): no luck"}
    assert len(files(tmp_path)) == (1 if fail_at == 1 else 3)  # the plan, and finished shards
    passes(tmp_path, 2)
    assert files(tmp_path) == straight[0]


def test_where_forwards_are_of_all_ranks_none_leaves_one_to_tell_the_others(tmp_path, straight):
    """It ends by itself, and with it those that wait for it."""
    models = [CountingModel(), CountingModel(fail_at=2, error=ModelError)]
    first, second = passes(tmp_path, 2, models=models, forwards_together=True)
    assert isinstance(first, threading.BrokenBarrierError)
    assert (type(second), str(second), second.rank) == (ModelError, "no luck", None)
    passes(tmp_path, 2, forwards_together=True)
    assert files(tmp_path) == straight[0]


def test_added_rows_and_lost_shards_are_computed_alone(tmp_path):
    passes(tmp_path, 2, examples=EXAMPLES[:20])
    shards = list((tmp_path / "reference" / "ns").glob("*.safetensors"))
    for values in passes(tmp_path, 2):
        assert (values.num_computed, values.num_reused) == (20, 40)
    shards[0].unlink()
    first, second = passes(tmp_path, 2)
    assert first.num_computed == second.num_computed > 0
    assert torch.equal(first.sums, second.sums)


def test_ranks_wait_for_a_shard_that_another_process_computes(tmp_path, straight):
    store, said = ReferenceStore(tmp_path, "ns", {}), []
    held = store.folder / min(name for name in straight[0] if name.endswith(".safetensors"))
    outcomes = []
    with store.claim(held) as is_ours:
        assert is_ours
        thread = threading.Thread(target=lambda: outcomes.extend(passes(tmp_path, 2, said=said)))
        thread.start()
        while not said:
            time.sleep(0.02)
        assert len(files(tmp_path)) == len(straight[0]) - 1
        held.write_bytes(straight[0][held.name])  # the other process is done
    thread.join()
    assert said == [
        f"waiting for 1 shards of reference log-probs, which another process is computing in "
        f"{store.folder}"
    ]
    assert files(tmp_path) == straight[0]
    for values in outcomes:
        assert values.num_reused == NUM_ANSWERS - values.num_computed > 0
        assert torch.equal(values.sums, straight[1])


def test_each_file_system_gets_all_values_by_one_rank(tmp_path, straight):
    """Three hosts with folders of their own; the second has some of the values."""
    roots = [tmp_path / f"host{rank // 2}" for rank in range(6)]
    passes(roots[2], 1, examples=EXAMPLES[:10])
    before = files(roots[2])
    passes(roots, 6)
    assert files(roots[0]) == straight[0]

    def copy(ranks):
        store = ReferenceStore(roots[ranks.rank], "ns", {})
        if ranks.rank % 2:
            store.write_copy = None  # not this rank's work
        copy_to_file_systems(store, ranks, is_leader=ranks.rank % 2 == 0)

    assert on_ranks(6, copy) == [None] * 6
    assert files(roots[4]) == straight[0]
    assert files(roots[2]) == before | straight[0]
    roots[0], roots[4] = roots[4], roots[0]  # another host is the first one the next time
    for values in passes(roots, 6):
        assert values.num_computed == 0
        assert torch.equal(values.sums, straight[1])


def test_a_file_system_that_is_full_is_told_by_all(tmp_path, monkeypatch):
    roots = [tmp_path / "0", tmp_path / "1"]
    passes(roots, 2)

    def full(self, name, content):
        raise CacheError("no space left")

    monkeypatch.setattr(ReferenceStore, "write_copy", full)

    def copy(ranks):
        copy_to_file_systems(ReferenceStore(roots[ranks.rank], "ns", {}), ranks, is_leader=True)

    assert {str(error) for error in on_ranks(2, copy)} == {
        "on rank 1 of 2 (host host0): no space left"
    }
