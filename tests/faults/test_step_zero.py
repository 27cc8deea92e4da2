"""The check before the first step catches what would train on quietly, from a wrong start."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig

from preftune import train
from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.batching.micro_batches import RowSizes
from preftune.errors import CacheError, ModelError
from preftune.losses import DPOLossType, make_loss
from preftune.model.attention import REGISTERED
from preftune.model.forward import PolicyModel
from preftune.objective import PairObjective
from preftune.recipes.step_zero import (
    check_step_zero,
    compared_rows,
    plain_rows,
    plain_scores,
)
from preftune.reference.build import reference_logps
from preftune.reference.store import ReferenceStore
from preftune.schema import Completion
from tests.examples import make_examples
from tests.runs import tiny_config
from tests.tiny import tiny_model

CPU = torch.device("cpu")
EXAMPLES = make_examples(12)
SIZES = RowSizes.of(EXAMPLES)


def scores_of(model):
    return plain_scores(model, EXAMPLES, plain_rows(SIZES), None)


@pytest.fixture
def stored(tmp_path):
    """The log-prob sums that a reference pass stores of a model as it is now."""

    def compute(model, layout):
        name = str(len(list(tmp_path.iterdir())))
        store = ReferenceStore(tmp_path / name, "ns", {})
        return reference_logps(PolicyModel(model), EXAMPLES, store, layout=layout, device=CPU).sums

    return compute


def check(model, sums, plain, *, layout, batcher=RowBatcher, **options):
    return check_step_zero(
        PolicyModel(model),
        PairObjective(make_loss(DPOLossType.DPO)),
        batcher(EXAMPLES, sums, layout, CPU),
        [compared_rows(len(EXAMPLES))],
        is_exact=True,
        plain=plain,
        **options,
    )


@pytest.fixture(params=["concatenated", "shared_prefix"])
def layout(request):
    return Layout(request.param)


def start_model(layout, change=lambda model: model):
    model = change(tiny_model())
    if layout.name == "shared_prefix":
        model.set_attn_implementation(REGISTERED["sdpa"])
    return model


def test_a_right_start_passes(stored, layout):
    plain = scores_of(tiny_model())
    model = start_model(layout)
    for alpha in (1.0, 0.5):
        one = replace(layout, ld_alpha=alpha)
        assert check(model, stored(model, one), plain, layout=one) == pytest.approx(
            math.log(2), abs=1e-5
        )


def a_bit_trained(model):
    """Steps of SGD on the answers' tokens, through whatever weights of the model learn."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for example in EXAMPLES:
        ids = torch.tensor([[*example.prompt_ids, *example.completions[0].ids]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_reference_from_trained_weights(stored, layout):
    plain = scores_of(tiny_model())
    sums = stored(start_model(layout, a_bit_trained), layout)
    # Even where only the compared rows, or only the plain ones, were looked at.
    for held_against in (plain, None):
        with pytest.raises(CacheError, match="before the first step the"):
            check(start_model(layout), sums, held_against, layout=layout)


def test_a_store_filled_by_the_trained_model_stops_the_run(tmp_path):
    """Whole runs: the values of the trained model lie where the start's should."""
    final = train(tiny_config(tmp_path, learning_rate=1e-2)).folder.final
    (start,) = (tmp_path / "cache" / "reference").iterdir()
    train(tiny_config(tmp_path, model_name_or_path=final, output_dir=tmp_path / "b"))
    (trained,) = set((tmp_path / "cache" / "reference").iterdir()) - {start}
    for shard in trained.glob("*.safetensors"):
        (start / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(CacheError, match=r"log-prob of .* must agree to"):
        train(tiny_config(tmp_path, output_dir=tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def with_lora(model, **options):
    """Low-rank matrices beside the projections, put in by peft."""
    targets = ["q_proj", "v_proj", "down_proj"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    return model.eval()


def test_both_models_on_the_bare_base_of_an_sft_adapter(stored, layout):
    """The loss is ln 2, and policy and reference agree: only the start's own values tell."""
    model = a_bit_trained(with_lora(tiny_model()))
    plain = scores_of(model)
    if layout.name == "shared_prefix":
        model.set_attn_implementation(REGISTERED["sdpa"])
    assert check(model, stored(model, layout), plain, layout=layout) > 0
    model.disable_adapters()
    sums = stored(model, layout)
    assert check(model, sums, None, layout=layout) == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(CacheError, match=r"the model as it was loaded, with its adapters"):
        check(model, sums, plain, layout=layout)


def test_an_adapters_folder_is_refused_rather_than_started_from_its_base(tmp_path):
    config = tiny_config(tmp_path)
    model = with_lora(tiny_model())
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    for folder in (tmp_path / "adapter", tmp_path / "model"):
        if folder.name == "model":  # a full model, beside it an adapter that would be lost
            (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"an adapter .* merge the two"):
            train(tiny_config(tmp_path, model_name_or_path=folder))
    assert not (tmp_path / config.output_dir).exists()


def test_pissa_with_its_adapter_off(stored, layout):
    """PiSSA takes the largest part of each matrix out of the base, into the adapter."""
    plain = scores_of(tiny_model())
    model = with_lora(start_model(layout), init_lora_weights="pissa")
    right = stored(model, layout)
    assert check(model, right, plain, layout=layout) > 0
    model.disable_adapters()
    bare = stored(model, layout)
    assert check(model, bare, None, layout=layout) == pytest.approx(math.log(2), abs=1e-5)
    for sums in (right, bare):
        with pytest.raises(CacheError, match="before the first step the"):
            check(model, sums, plain, layout=layout)


@pytest.mark.parametrize(
    "swapped",
    [lambda sums: sums.roll(1, dims=0), lambda sums: sums.flip(0), lambda sums: sums.flip(1)],
    ids=["next row's", "last row's", "other side's"],
)
def test_values_of_other_rows(stored, layout, swapped):
    model = start_model(layout)
    with pytest.raises(CacheError, match="before the first step the"):
        check(model, swapped(stored(model, layout)), scores_of(tiny_model()), layout=layout)


def test_rows_far_behind_the_first_batch_are_compared():
    assert compared_rows(1000)[0] == 0
    assert compared_rows(1000)[-1] == 999
    assert len(compared_rows(1000)) == 8
    assert compared_rows(3) == [0, 1, 2]


@dataclass(frozen=True)
class _WithPrompt(RowBatcher):
    """A batcher at fault: all of the prompt but its first token counts as the answer's."""

    def lay_out(self, rows, batch=None):
        return RowBatcher(moved(self.examples), None, self.layout, CPU).lay_out(rows, batch)


def moved(examples):
    return [
        replace(
            example,
            prompt_ids=example.prompt_ids[:1],
            completions=tuple(
                Completion(example.prompt_ids[1:] + side.ids) for side in example.completions
            ),
        )
        for example in examples
    ]


def test_prompt_tokens_scored_on_both_sides(tmp_path, layout):
    """Policy and reference agree, and the loss is ln 2."""
    model = start_model(layout)
    store = ReferenceStore(tmp_path, "ns", {})
    whole = reference_logps(PolicyModel(model), moved(EXAMPLES), store, layout=layout, device=CPU)
    options = {"layout": layout, "batcher": _WithPrompt}
    assert check(model, whole.sums, None, **options) == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(CacheError, match=r"tokens of answer 1 of row-\d+ are scored, and it has"):
        check(model, whole.sums, scores_of(tiny_model()), **options)


def test_of_another_reference_model_values_may_differ_and_must_be_finite(stored, layout):
    model, other = start_model(layout), tiny_model(seed=1)
    if layout.name == "shared_prefix":
        other.set_attn_implementation(REGISTERED["sdpa"])
    sums = stored(other, layout)
    plain = scores_of(tiny_model())
    with pytest.raises(CacheError):
        check(model, sums, plain, layout=layout)
    check(model, sums, plain, layout=layout, reference_is_start=False)
    sums[7, 1] = math.nan
    with pytest.raises(CacheError, match=r"gives 1 of 12 rows .* not finite \(row-7\)"):
        check(model, sums, plain, layout=layout, reference_is_start=False)


def test_a_policy_that_gives_no_number(stored, layout):
    sums = stored(start_model(layout), layout)
    broken = start_model(layout)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.inf
    for plain in (scores_of(tiny_model()), None):
        with pytest.raises(CacheError, match="before the first step the policy gives"):
            check(broken, sums, plain, layout=layout)


def test_bf16_has_room_for_rounding_and_none_for_the_prompt(tmp_path):
    config = tiny_config(tmp_path, dtype="bfloat16", mixed_precision="bf16", num_epochs=0.1)
    assert train(config).manifest["status"] == "finished"
