"""`preftune score` of several models, references and adapters, in whole runs."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from preftune import train
from preftune.cli.main import main
from preftune.config.score import ScoreConfig, short_labels
from preftune.recipes.score import score
from tests.runs import arguments, tiny_config, tiny_model_folder, tiny_settings
from tests.tiny import make_pairs, tiny_model, write_jsonl

KEPT = ("model_name_or_path", "dataset_name", "cache_dir", "mixed_precision", "progress")


@pytest.fixture
def root(tmp_path):
    """Three models, and pairs of two sources."""
    rows = make_pairs(21, seed=0)
    for index, row in enumerate(rows):
        row["source"] = "first" if index < 14 else "second"
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    for seed, name in enumerate(("one", "two"), start=1):
        tiny_model(seed=seed).save_pretrained(tiny_model_folder(tmp_path / name))
    return tmp_path


def options(root, **more):
    made = tiny_settings(root)
    return {name: made[name] for name in KEPT} | more


def test_several_models_and_references_say_what_each_says_alone(root, capsys):
    files = {"output": root / "all.parquet", "summary": root / "all.json"}
    files |= {"lists": root / "all.jsonl", "list_size": 2}
    words = arguments(options(root, **files))
    words += ["--other_models", str(root / "one"), "--reference_model_name_or_path"]
    assert main(["score", *words, str(root / "one"), str(root / "two")]) == 0
    table = pq.read_table(root / "all.parquet").to_pydict()
    assert table["source"] == ["first"] * 14 + ["second"] * 7
    summary = json.loads((root / "all.json").read_text())
    against = {(r["model"], r["reference"]): r["rewards"] for r in summary["total"]["rewards"]}
    assert set(against) == {("model", "one"), ("model", "two"), ("one", "two")}
    for (model, reference), rewards in against.items():
        alone = score(
            ScoreConfig(
                **options(root, output=str(root / f"{model}-{reference}.parquet"))
                | {"model_name_or_path": str(root / model)},
                reference_model_name_or_path=[str(root / reference)],
            )
        )
        found = alone.summary.against_reference.rewards
        assert rewards["margin"] == pytest.approx(found.margin, abs=1e-6)
        single = pq.read_table(root / f"{model}-{reference}.parquet").to_pydict()
        for ours, theirs in (
            (f"{model}/logps_chosen", "logps_chosen"),
            (f"{reference}/logps_rejected", "reference_logps_rejected"),
            (f"{model}/reward_chosen/{reference}", "reward_chosen"),
        ):
            assert table[ours] == pytest.approx(single[theirs], abs=1e-6)
    assert [source["num_pairs"] for source in summary["sources"]] == [14, 7]
    listed = [json.loads(line) for line in (root / "all.jsonl").read_text().splitlines()]
    assert {row["list"] for row in listed} <= {"mislabelled", "hard", "learnt"}
    hard = [row for row in listed if row["list"] == "hard"]
    assert len(hard) == 2 < summary["lists"]["hard"]
    place = table["row_id"].index(hard[0]["row_id"])
    gap = table["one/reward_chosen/two"][place] - table["one/reward_rejected/two"][place]
    assert hard[0]["margins"]["one against two"] == pytest.approx(gap)
    assert hard[0]["chosen"].startswith("Yes ")
    said = capsys.readouterr().out
    assert "implicit rewards against two, beta 0.1" in said
    assert f"too hard: {summary['lists']['hard']} pairs, the first 2 in the file" in said


def test_an_adapter_is_scored_on_its_base(root):
    run = train(tiny_config(root, use_lora=True))
    adapter = run.folder.final
    merged = root / "merged"
    assert main(["merge", "--adapter", str(adapter), "--output", str(merged)]) == 0
    base = str(root / "model")
    both = score(
        ScoreConfig(
            **options(root) | {"model_name_or_path": str(adapter)},
            other_models=[str(merged)],
            reference_model_name_or_path=[base],
        )
    ).summary
    assert list(both.models) == ["run/final", "merged"]
    over_base, whole = (held.rewards for held in both.total.rewards)
    assert over_base.margin == pytest.approx(whole.margin, abs=1e-5)
    assert abs(over_base.margin) > 1e-4


def test_other_tokens_and_lost_bases_are_refused_before_weights_load(root, capsys):
    words = arguments(options(root, other_models=root / "one"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "one" / name).unlink()
    assert main(["score", *words]) == 2
    error = capsys.readouterr().err
    assert "other_models is " in error
    assert "its tokenizer, which must be the policy's, cannot be read" in error
    adapter = root / "adapter"
    shutil.copytree(root / "two", adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert main(["score", *arguments(options(root, other_models=adapter))]) == 2
    error = capsys.readouterr().err
    assert "names no base" in error
    assert "loading" not in error
    lost = {"peft_type": "LORA", "base_model_name_or_path": "/lost"}
    (adapter / "adapter_config.json").write_text(json.dumps(lost))
    assert main(["score", *arguments(options(root, other_models=adapter))]) == 2
    assert f"the base that {adapter} names is '/lost': no such folder" in capsys.readouterr().err
    there = root / "there.jsonl"
    there.write_text("")
    assert main(["score", *arguments(options(root, lists=there))]) == 2
    assert f"lists is '{there}', which exists; give another name" in capsys.readouterr().err


def test_labels_are_the_ends_that_tell_paths_apart():
    assert short_labels(["org/base", "runs/a/final", "runs/b/final", "c/d", "e/d", "d"]) == {
        "org/base": "base",
        "runs/a/final": "a/final",
        "runs/b/final": "b/final",
        "c/d": "c/d",
        "e/d": "e/d",
        "d": "d",
    }
    assert short_labels(["final"]) == {"final": "final"}
    assert short_labels(["x/1/final", "y/1/final"]) == {
        "x/1/final": "x/1/final",
        "y/1/final": "y/1/final",
    }
