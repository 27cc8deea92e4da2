"""The file of a pipeline: what stages share, what they have from each other, and every mistake."""

from pathlib import Path
from typing import Any

import pytest

from preftune.config.pipeline import Pipeline, read_pipeline
from preftune.errors import ConfigError

FULL = """\
output_dir: chain
model_name_or_path: base
seed: 3
max_length: 100
beta: 0.2
stages:
  sft: {dataset_name: said, learning_rate: 1e-5}
  dpo: {dataset_name: pairs}
  evaluate: {dataset_name: held_out}
"""
LORA = """\
output_dir: chain
model_name_or_path: base
model_revision: abc
chat_template: zephyr
use_lora: true
lora_r: 4
save_dtype: bfloat16
stages:
  sft: {dataset_name: said}
  dpo: {dataset_name: pairs, lora_dropout: 0.1}
  merge:
  evaluate: {dataset_name: held_out, reference_model_name_or_path: base}
"""


def read(tmp_path: Path, text: str) -> Pipeline:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return read_pipeline(str(path))


def settings(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    return {stage.name: stage.config.to_dict() for stage in pipeline.stages}


def test_whole_weights_go_from_stage_to_stage(tmp_path):
    of = settings(read(tmp_path, FULL))
    assert list(of) == ["sft", "dpo", "evaluate"]
    assert (of["sft"]["stage"], of["dpo"]["stage"]) == ("sft", "dpo")
    assert [of[name]["model_name_or_path"] for name in of] == [
        "base",
        "chain/sft/final",
        "chain/dpo/final",
    ]
    assert of["evaluate"]["reference_model_name_or_path"] == ["chain/sft/final"]
    assert (of["sft"]["learning_rate"], of["dpo"]["learning_rate"]) == (1e-5, 5e-7)
    assert of["sft"]["seed"] == of["dpo"]["seed"] == 3
    assert [of[name]["max_length"] for name in of] == [100, 100, 100]
    assert "beta" not in of["sft"]  # no such setting there
    assert of["dpo"]["beta"] == 0.2
    assert of["dpo"]["output_dir"] == "chain/dpo"


def test_an_adapter_goes_on_over_the_same_base(tmp_path):
    of = settings(read(tmp_path, LORA))
    sft, dpo = of["sft"], of["dpo"]
    assert dpo["model_name_or_path"] == sft["model_name_or_path"] == "base"
    assert dpo["model_revision"] == "abc"
    assert dpo["adapter_name_or_path"] == dpo["tokenizer_name_or_path"] == "chain/sft/final"
    assert (sft["lora_r"], sft["chat_template"]) == (4, "zephyr")
    assert "lora_r" not in dpo  # the adapter's own
    assert "chat_template" not in dpo
    assert dpo["lora_dropout"] == 0.1
    assert of["merge"]["adapter"] == "chain/dpo/final"
    assert of["merge"]["output"] == of["evaluate"]["model_name_or_path"] == "chain/merge/model"
    assert of["merge"]["save_dtype"] == "bfloat16"
    assert "model_name_or_path" not in of["merge"]  # the adapter's files name base and revision
    assert of["evaluate"]["reference_model_name_or_path"] == ["base"]


def test_a_stage_may_be_missing(tmp_path):
    alone = "output_dir: o\nmodel_name_or_path: base\nstages:\n  dpo: {dataset_name: p}\n"
    (stage,) = read(tmp_path, alone).stages
    assert stage.training.model_name_or_path == "base"
    more = read(tmp_path, alone + "  evaluate: {dataset_name: e}\n")
    assert settings(more)["evaluate"]["reference_model_name_or_path"] == ["base"]


MISTAKES = {
    "a stage of another name": (
        "  sft: {",
        "  sfft: {",
        ["line 7: 'sfft' is no stage; they are sft, dpo, merge, evaluate"],
    ),
    "another order": (
        "  evaluate: {dataset_name: held_out}\n",
        "  evaluate: {dataset_name: held_out}\n  merge:\n",
        ["line 10: stage merge stands too late; the order is sft -> dpo -> merge -> evaluate"],
    ),
    "a stage twice": (
        "  evaluate:",
        "  dpo: {dataset_name: x}\n  evaluate:",
        ["line 9: stage dpo is given twice; keep one"],
    ),
    "no stages": (FULL[FULL.index("stages") :], "", ["stages must be given once"]),
    "a stage that is no mapping": (
        "{dataset_name: pairs}",
        "pairs",
        ["line 8: dpo must hold a mapping"],
    ),
    "no folder": ("output_dir: chain", "", ["output_dir must name the folder"]),
    "an unknown shared setting": ("seed: 3", "sed: 3", ["line 3: sed is not an option"]),
    "a shared setting that nothing reads": (
        "seed: 3",
        "kl_samples: 3",
        ["line 3: kl_samples is read by no stage"],
    ),
    "a shared preset": ("seed: 3", "preset: laptop", ["preset belongs to one stage"]),
    "a setting given twice": ("seed: 3", "seed: 3\nseed: 4", ["line 4: seed is given twice"]),
    "an unknown setting of a stage": (
        "{dataset_name: pairs}",
        "{dataset_name: pairs, betta: 1}",
        ["line 8: stage dpo: betta is not an option; did you mean beta?"],
    ),
    "what the pipeline sets": (
        "{dataset_name: pairs}",
        "{dataset_name: pairs, output_dir: x}",
        ["stage dpo: output_dir follows from"],
    ),
    "the model of a later stage": (
        "{dataset_name: pairs}",
        "{dataset_name: pairs, model_name_or_path: x}",
        ["stage dpo: ", "line 8: model_name_or_path follows from the stage before"],
    ),
    "mistakes of several stages": (
        "said, learning_rate: 1e-5}\n  dpo: {dataset_name: pairs}",
        "said, learning_rate: -1, beta: 0.1}\n  dpo: {dataset_name: pairs, beta: 0}",
        [
            "stage sft: ",
            "line 7: learning_rate is -1.0; it must be above 0",
            "line 7: beta is 0.1; stage sft does not read it",
            "stage dpo: ",
            "line 8: beta is 0.0",
        ],
    ),
    "a merge of whole weights": (
        "  evaluate:",
        "  merge:\n  evaluate:",
        ["stage merge: stage dpo trains all weights, so there is no adapter to merge"],
    ),
    "nothing that trains": (
        "  sft: {dataset_name: said, learning_rate: 1e-5}\n  dpo: {dataset_name: pairs}\n",
        "",
        ["stage evaluate: no stage before it trains: give sft or dpo"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_place(tmp_path, name):
    old, new, expected = MISTAKES[name]
    assert old in FULL
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, FULL.replace(old, new, 1))
    for text in expected:
        assert text in str(caught.value)


def test_what_follows_from_a_mistake_is_not_told(tmp_path):
    text = FULL.replace("model_name_or_path: base\n", "", 1)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert caught.value.problems == [
        "stage sft: model_name_or_path is not set; "
        + caught.value.problems[0].partition("not set; ")[2]
    ]


def test_an_adapter_that_is_evaluated_must_be_merged(tmp_path):
    with pytest.raises(ConfigError, match="stage evaluate: stage dpo trains an adapter, and what"):
        read(tmp_path, LORA.replace("  merge:\n", "", 1).replace("save_dtype: bfloat16\n", ""))


def test_an_adapter_cannot_be_left_behind(tmp_path):
    text = LORA.replace("lora_dropout: 0.1", "use_lora: false", 1)
    with pytest.raises(ConfigError, match=r"stage dpo: .*use_lora follows from the stage before"):
        read(tmp_path, text)


def test_two_stages_do_not_push_to_one_place(tmp_path):
    pushing = FULL.replace("seed: 3", "push_to_hub: true\nhub_repo_id: ann/tiny")
    told = r"stage dpo: hub_repo_id is 'ann/tiny', to which stage sft pushes, too"
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, pushing)
    of = settings(read(tmp_path, pushing.replace("said,", "said, hub_revision: sft,")))
    assert (of["sft"]["hub_revision"], of["dpo"]["hub_revision"]) == ("sft", "main")
