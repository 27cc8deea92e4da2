"""The store: what is reused, what is computed, and what happens after a kill or damage."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from preftune.batching.layout import Layout, build_layout
from preftune.data.pairs import PairDataset
from preftune.errors import CacheError
from preftune.model.attention import REGISTERED
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.layout_choice import choose_layout
from preftune.reference import fingerprints
from preftune.reference.build import ShardSize, reference_logps
from preftune.reference.fingerprints import completion_key, namespace_fields, namespace_key
from preftune.reference.store import ReferenceStore
from preftune.schema import Completion, TokenizedExample
from tests.examples import make_examples
from tests.policies import CountingModel
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def compute(root, examples, model=None, **options):
    store = ReferenceStore(root, "ns", {"what": "test"})
    policy = PolicyModel(tiny_model()) if model is None else model
    return reference_logps(
        policy,
        examples,
        store,
        layout=Layout("concatenated"),
        device=CPU,
        shard_size=ShardSize(tokens=200, micro_batches=2),
        **options,
    )


def bytes_of(root) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (root / "reference" / "ns").glob("*.safetensors")}


def test_values_are_those_of_the_model(tmp_path):
    examples = make_examples(9)
    values = compute(tmp_path, examples)
    policy = PolicyModel(tiny_model())
    with torch.no_grad():
        for row, example in zip(values.sums, examples, strict=True):
            alone = pair_logps(policy, build_layout([example], "separate")).sums
            assert torch.allclose(row, alone, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated", "separate"])
def test_a_mismatched_answer_is_scored_once_behind_the_prompt_of_its_row(tmp_path, layout):
    lone = [
        replace(example, completions=example.completions[:1], roles=("rejected",))
        for example in make_examples(6)
    ]
    own = PairDataset.of("d", lone).examples
    rows = own.with_mismatched(0)
    alone = compute(tmp_path, own)
    both = compute(tmp_path, rows)
    assert (alone.sums.shape, both.sums.shape) == ((6, 1), (6, 2))
    assert (both.num_computed, both.num_reused) == (6, 6)
    assert torch.equal(both.sums[:, :1], alone.sums)
    policy = PolicyModel(tiny_model())
    assert choose_layout(policy, layout, "auto", longest=100).name == layout
    with torch.no_grad():
        together = pair_logps(policy, build_layout(list(rows), layout)).sums.view(6, 2)
    assert torch.allclose(both.sums, together, atol=1e-4, rtol=1e-6)


def test_a_second_pass_computes_nothing(tmp_path):
    first = compute(tmp_path, make_examples(9))
    model = CountingModel()
    second = compute(tmp_path, make_examples(9), model)
    assert (first.num_computed, first.num_reused) == (18, 0)
    assert (second.num_computed, second.num_reused) == (0, 18)
    assert model.num_forwards == 0
    assert torch.equal(first.sums, second.sums)


def test_added_rows_are_the_only_ones_computed(tmp_path):
    examples = make_examples(12)
    compute(tmp_path, examples[:9])
    more = compute(tmp_path, examples)
    assert (more.num_computed, more.num_reused) == (6, 18)


def test_answers_that_repeat_are_computed_once(tmp_path):
    examples = make_examples(3)
    values = compute(tmp_path, [*examples, *examples])
    assert values.num_computed == 6
    assert torch.equal(values.sums[:3], values.sums[3:])


@pytest.mark.parametrize("fail_at", [1, 3, 4])
def test_a_killed_pass_ends_in_the_same_bytes(tmp_path, fail_at):
    examples = make_examples(9)
    compute(tmp_path / "straight", examples)
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "killed", examples, CountingModel(fail_at))
    compute(tmp_path / "killed", examples)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "straight")


def test_stored_tokens_add_up_to_the_sum(tmp_path):
    examples = make_examples(2)
    values = compute(tmp_path, examples)
    entries = ReferenceStore(tmp_path, "ns", {}).read()
    for row, example in zip(values.sums, examples, strict=True):
        for total, completion in zip(row, example.completions, strict=True):
            entry = entries[completion_key(example, completion)]
            assert entry.per_token.shape == (len(completion.ids),)
            assert entry.per_token.dtype == np.float32
            assert entry.sum == total.item()
            assert entry.per_token.astype(np.float64).sum() == pytest.approx(entry.sum, abs=1e-9)


def test_the_boundary_is_part_of_the_key():
    """[1, 2] + [3] and [1] + [2, 3] are the same sequence and different answers."""

    def key(prompt, completion, scored=None):
        answer = Completion(completion, scored)
        example = TokenizedExample("r", prompt, (answer,), ("chosen",), "s", 0)
        return completion_key(example, answer)

    assert key((1, 2), (3,)) != key((1,), (2, 3))
    assert key((1,), (2, 3)) != key((1,), (2, 3), (True, False))
    assert key((1,), (2, 3)) == key((1,), (2, 3))


def test_the_namespace_follows_the_attention_kernel(monkeypatch):
    def space(attention):
        model = tiny_model()
        model.set_attn_implementation(attention)
        return namespace_key(
            namespace_fields(
                PolicyModel(model), precision="fp32", layout="shared_prefix", device="cpu"
            )
        )

    spaces = {space(name) for name in REGISTERED.values()}
    assert len(spaces) == len(REGISTERED)
    before = space(REGISTERED["flash_attention_2"])
    monkeypatch.setattr(fingerprints, "version", lambda package: f"9 of {package}")
    assert space(REGISTERED["flash_attention_2"]) != before
    assert space(REGISTERED["varlen"]) in spaces


def test_the_namespace_follows_content_not_names():
    def space(model, precision="fp32", layout="concatenated"):
        return namespace_key(
            namespace_fields(PolicyModel(model), precision=precision, layout=layout, device="cpu")
        )

    base = space(tiny_model())
    renamed = tiny_model()
    renamed.config._name_or_path = "elsewhere"
    assert space(renamed) == base
    changed = tiny_model()
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1e-3
    assert space(changed) != base
    rope = tiny_model()
    rope.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    assert space(rope) != base
    assert space(tiny_model(), precision="bf16") != base
    assert space(tiny_model(), layout="separate") != base
    assert space(tiny_model().to(torch.bfloat16)) != base


def test_an_unwritable_cache_is_an_error_with_a_remedy(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CacheError, match="--cache_dir"):
        ReferenceStore(blocked, "ns", {})


def test_a_pass_keeps_its_own_values_when_others_add_theirs(tmp_path):
    """Two jobs on overlapping rows: whoever comes later changes nothing of the other's."""
    ours, theirs = make_examples(30)[:20], make_examples(30)[10:]
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, ours, CountingModel(fail_at=4))
    compute(tmp_path, theirs)
    first = compute(tmp_path, ours)
    compute(tmp_path, make_examples(30))
    model = CountingModel()
    second = compute(tmp_path, ours, model)
    assert model.num_forwards == 0
    assert torch.equal(first.sums, second.sums)


def test_deleted_values_of_another_pass_are_computed_again(tmp_path):
    compute(tmp_path, make_examples(9)[:6])
    shards = set((tmp_path / "reference" / "ns").glob("*.safetensors"))
    whole = compute(tmp_path, make_examples(9))
    for shard in shards:
        shard.unlink()
    again = compute(tmp_path, make_examples(9))
    assert (again.num_computed, again.num_reused) == (12, 6)
    assert torch.allclose(whole.sums, again.sums, atol=1e-4)
