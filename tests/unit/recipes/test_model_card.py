"""The card: metadata that the hub reads, facts of the run, nothing of the machine, no guess."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from preftune import ExperimentConfig
from preftune.recipes.model_card import card_at, model_card
from preftune.recipes.results import held_out_results

COMMIT = "a" * 40
COUNTS = {"read": 12, "kept": 10, "dropped": {"empty answer": 2}, "num_pairs": 10}
FACTS: dict[str, Any] = {
    "versions": {"preftune": "0.1.0", "torch": "2.13.0"},
    "steps": 4,
    "global_batch_size": 8,
    "precision": "bf16",
    "save_dtype": "float32",
    "model_commit": COMMIT,
    "data": {
        "train": COUNTS
        | {
            "name": "org/pairs:easy",
            "sources": [
                COUNTS
                | {"name": "org/pairs:easy", "split": "train", "revision": COMMIT}
                | {"amount": None, "drawn": 12},
                COUNTS
                | {"name": "/home/ann/mine.jsonl", "split": "train", "revision": None}
                | {"amount": 0.5, "drawn": 6},
            ],
        },
        "held_out/easy": {"name": "org/pairs", "num_pairs": 3, "sources": []},
    },
    "results": [
        {"step": 2, "eval/easy/loss": 0.69, "eval/easy/rewards/accuracies": 0.5},
        {"step": 4, "eval/easy/loss": 0.61, "eval/easy/rewards/accuracies": 0.75},
    ],
}


def card(facts: dict[str, Any] = FACTS, is_adapter: bool = False, **options: Any) -> str:
    settings = {"model_name_or_path": "org/base", "dataset_name": "org/pairs:easy"}
    return model_card(ExperimentConfig(**(settings | options)), facts, is_adapter)


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def known_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's card in the hub's cache, as huggingface_hub lays it out."""
    snapshot = tmp_path / "models--org--base" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: llama3\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_the_hub_reads_its_metadata(known_base: None) -> None:
    data = ModelCard(card()).data
    assert data.base_model == "org/base"
    assert data["base_model_relation"] == "finetune"
    assert (data.license, data.license_link) == ("llama3", "LICENSE")
    assert data.datasets == ["org/pairs"]  # hub names only
    assert data.tags == ["preftune", "dpo"]
    assert data.eval_results is not None
    found = {r.metric_name: (r.dataset_name, r.metric_value) for r in data.eval_results}
    assert found["eval/easy/loss"] == ("easy", 0.61)  # the last evaluation
    assert found["eval/easy/rewards/accuracies"] == ("easy", 0.75)
    assert "llama3 (LICENSE), carried over from `org/base`" in card()


def test_an_unknown_licence_is_not_guessed() -> None:
    text = card()
    assert "license" not in front(text)
    assert "That of `org/base`, which is not known here" in text


def test_a_local_base_is_named_by_its_last_part_and_says_what_it_was_made_from(
    tmp_path: Path,
) -> None:
    local = tmp_path / "sft"
    local.mkdir()
    assert "base_model" not in front(card(model_name_or_path=str(local)))
    (local / "README.md").write_text("---\nbase_model: org/base\nlicense: apache-2.0\n---\n")
    text = card(model_name_or_path=str(local), is_adapter=True, use_lora=True)
    assert str(tmp_path) not in text
    said = front(text)
    assert (said["base_model"], said["license"]) == ("org/base", "apache-2.0")
    assert (said["base_model_relation"], said["library_name"]) == ("adapter", "peft")
    assert said["tags"] == ["preftune", "dpo", "lora"]


@pytest.mark.parametrize("damaged", ["---\n: : :\n---\n", "---\n- a\n---", "no front", "\xff"])
def test_a_damaged_card_of_the_base_is_no_card(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "README.md").write_bytes(damaged.encode("latin-1"))
    assert "license" not in front(card(model_name_or_path=str(tmp_path)))


def test_it_says_what_was_read_dropped_measured_and_how() -> None:
    text = card(beta=0.3, seed=7)
    for fact in (
        f"- `org/pairs:easy` at {COMMIT}, split train: 12 rows read, 10 kept; dropped: 2 empty",
        "- `mine.jsonl`, split train: 12 rows read, 10 kept, of which 6 were drawn;",
        "- Trained on 10 pairs; dropped: 2 empty answer",
        "- Held out, never trained on: 3 pairs of `easy`",
        "| Steps | 4, 8 pairs each |",
        '"beta": 0.3',
        "| Seed | 7 |",
        "| Metric | after step 2 | after step 4 |",
        "| `eval/easy/loss` | 0.69 | 0.61 |",
        "vllm serve PATH\n",
        "Made with preftune 0.1.0, torch 2.13.0.",
    ):
        assert fact in text
    assert "/home/ann" not in text


def test_nothing_held_out_is_said() -> None:
    text = card(FACTS | {"results": []})
    assert "Nothing was held out" in text
    assert "model-index" not in front(text)


def test_an_older_checkpoint_knows_less() -> None:
    text = card(FACTS | {"data": {"train": {"num_pairs": 3, "dropped": {}}}, "results": []})
    assert "- Trained on 3 pairs; dropped: none" in text


def test_on_a_hub_it_loads_from_there() -> None:
    text = card_at(card(), "ann/tiny", "dev")
    assert 'AutoTokenizer.from_pretrained("ann/tiny", revision="dev")' in text
    assert "vllm serve ann/tiny --revision dev\n" in text
    assert "PATH" not in text
    adapter = card_at(card(is_adapter=True, use_lora=True), "ann/tiny", "main")
    assert 'from_pretrained("org/base"), "ann/tiny")' in adapter
    assert "--max-lora-rank 16 --lora-modules trained=ann/tiny\n" in adapter


def test_results_are_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert held_out_results(metrics) == []
    lines = ['{"step": 1, "loss": 1}', '{"step": 2, "loss": 1, "eval/loss": 3.0}']
    metrics.write_text("\n".join(lines) + "\n")
    assert held_out_results(metrics) == [{"step": 2, "eval/loss": 3.0}]
    lines += ['{"step": 3, "eval/loss": 2.0}', '{"step": 4, "eval/loss": 1.0}', '{"step": 5}']
    metrics.write_text("\n".join(lines) + "\n")
    assert [r["eval/loss"] for r in held_out_results(metrics)] == [3.0, 1.0]
