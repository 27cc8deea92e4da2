"""`preftune cache`: build, show, verify, prune, export."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from preftune import ExperimentConfig, train
from preftune.cli.main import main
from preftune.config.score import ScoreConfig
from preftune.recipes.score import score
from preftune.reference.store import ReferenceStore, StoredLogps, read_shard
from tests.runs import arguments, tiny_config, tiny_settings


def said(capsys: Any, *words: str) -> str:
    assert main(["cache", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: Any, *words: str) -> str:
    assert main(["cache", *words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def namespaces(root: Path) -> list[Path]:
    return sorted(p for p in (root / "cache" / "reference").iterdir() if p.name[0] != ".")


def shards(root: Path) -> list[Path]:
    return sorted((root / "cache" / "reference").glob("*/*.safetensors"))


@pytest.mark.parametrize("layout", ["auto", "concatenated"])
def test_build_leaves_a_run_nothing_to_compute(tmp_path, capsys, layout):
    settings = tiny_settings(tmp_path, test_size=4, forward_layout=layout)
    printed = said(capsys, "build", *arguments(settings))
    assert "reference: 34 answers, 34 computed, 0 reused\n" in printed
    assert "reference (held out): 8 answers, 8 computed, 0 reused\n" in printed
    [namespace] = namespaces(tmp_path)
    assert f"log-probs are in {namespace}" in printed
    assert not (tmp_path / "run").exists()
    built = {path: path.read_bytes() for path in shards(tmp_path)}
    manifest = train(ExperimentConfig(**settings)).manifest
    assert manifest["reference"]["reference"] == {"computed": 0, "reused": 34}
    assert manifest["reference"]["reference (held out)"] == {"computed": 0, "reused": 8}
    # ... and the same bytes as if the run had built it.
    for path in shards(tmp_path):
        path.unlink()
    (tmp_path / "run").rename(tmp_path / "first")
    train(ExperimentConfig(**settings))
    assert {path: path.read_bytes() for path in shards(tmp_path)} == built


def test_build_for_a_reference_of_its_own_and_for_none(tmp_path, capsys):
    settings = tiny_settings(tmp_path)
    model = settings["model_name_or_path"]
    words = arguments(settings | {"reference_model_name_or_path": model})
    assert "42 computed" in said(capsys, "build", *words)
    assert "42 reused" in said(capsys, "build", *arguments(settings))
    for options in ({"loss_type": "simpo"}, {"sync_reference": "true"}):
        error = refused(capsys, "build", *arguments(settings | options))
        assert "so no reference log-probs are stored for this run" in error


def test_show_lists_what_there_is(tmp_path, capsys):
    cache = ["--cache_dir", str(tmp_path / "cache")]
    assert "0 namespaces, 0.00 MiB" in said(capsys, "show", *cache)
    train(tiny_config(tmp_path))
    train(tiny_config(tmp_path, dtype="bfloat16", output_dir=tmp_path / "b"))
    old = tmp_path / "cache" / "reference" / "0123"
    old.mkdir()
    (old / "namespace.json").write_text('{"weights": "abc"}')
    (old / "x-00000.safetensors").write_bytes(b"no shard")
    head, *lines = said(capsys, "show", *cache).splitlines()
    assert "3 namespaces" in head
    by_name = {line.split()[0]: line for line in lines}
    assert by_name.keys() == {path.name for path in namespaces(tmp_path)}
    numerics = [str(tmp_path / "model"), "torch.float32, fp32", "42 answers", "last used 20"]
    assert sum(all(word in line for word in numerics) for line in lines) == 1
    assert sum("torch.bfloat16" in line for line in lines) == 1
    assert "of another version of preftune" in by_name["0123"]
    assert "1 damaged" in by_name["0123"]


# ---------------------------------------------------------------- verify


def changed(path: Path, by: float) -> None:
    """Move one value of a shard, which stays whole."""
    entries = read_shard(path)
    key = next(iter(entries))
    entries[key] = StoredLogps(entries[key].sum, entries[key].per_token + np.float32(by))
    store = ReferenceStore(path.parents[2], path.parent.name, {})
    store.write_shard(path, entries)


def test_verify_scores_a_sample_again(tmp_path, capsys):
    settings = tiny_settings(tmp_path, test_size=4)
    words = arguments(settings)
    assert "cache build" in refused(capsys, "verify", *words)
    train(ExperimentConfig(**settings))
    printed = said(capsys, "verify", *words, "--verify_samples", "10")
    assert "2 shards read, none damaged" in printed
    assert "42 of this run's 42 answers are stored\n10 scored again" in printed
    changed(shards(tmp_path)[0], by=1e-6)  # rounding
    assert "42 scored again" in said(capsys, "verify", *words)
    changed(shards(tmp_path)[0], by=0.1)
    error = refused(capsys, "verify", *words)
    assert "1 of 42 answers that were scored again differ" in error
    assert "answer of pairs.jsonl:" in error
    # Few samples may miss it, and another seed draws others.
    drawn = [
        main(["cache", "verify", *words, "--verify_samples=9", f"--verify_seed={n}"])
        for n in range(9)
    ]
    assert set(drawn) == {0, 2}
    capsys.readouterr()
    for path in shards(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    error = refused(capsys, "verify", *words)
    assert "2 problems" in error
    assert all(str(path) in error for path in shards(tmp_path))


def test_verify_finds_values_of_another_model(tmp_path, capsys):
    train(tiny_config(tmp_path))
    trained = tmp_path / "run" / "final"
    other = tiny_settings(tmp_path, model_name_or_path=trained, output_dir=tmp_path / "b")
    first = namespaces(tmp_path)[0]
    said(capsys, "build", *arguments(other))
    [second] = set(namespaces(tmp_path)) - {first}
    for path in second.glob("*.safetensors"):
        path.write_bytes((first / path.name).read_bytes())
    assert "differ" in refused(capsys, "verify", *arguments(other))


# ---------------------------------------------------------------- prune


def test_prune_removes_what_is_old_and_says_what_it_frees(tmp_path, capsys):
    train(tiny_config(tmp_path))
    train(tiny_config(tmp_path, forward_layout="separate", output_dir=tmp_path / "b"))
    cache = ["--cache_dir", str(tmp_path / "cache")]
    old, new = namespaces(tmp_path)
    ten_days_ago = time.time() - 10 * 86400
    os.utime(old / "namespace.json", (ten_days_ago, ten_days_ago))
    size = sum(path.stat().st_size for path in old.iterdir())
    assert "freed 0 bytes" in said(capsys, "prune", *cache, "--older_than", "11")
    dry = said(capsys, "prune", *cache, "--older_than", "9.5", "--dry_run")
    assert f"would remove {old.name}" in dry
    assert f"would free {size} bytes" in dry
    assert new.name not in dry
    assert namespaces(tmp_path) == [old, new]
    (tmp_path / "cache" / "reference" / ".removed-by-a-killed-prune").mkdir()
    assert f"freed {size} bytes" in said(capsys, "prune", *cache, "--older_than", "9.5")
    assert list((tmp_path / "cache" / "reference").iterdir()) == [new]
    # A clock that was set back leaves times in the future: that is new, not old.
    ahead = time.time() + 86400
    os.utime(new / "namespace.json", (ahead, ahead))
    assert "freed 0 bytes" in said(capsys, "prune", *cache, "--older_than", "0")
    assert f"removed {new.name}" in said(capsys, "prune", *cache, "--namespace", new.name[:6])
    assert namespaces(tmp_path) == []


def test_prune_leaves_what_is_in_use(tmp_path, capsys):
    train(tiny_config(tmp_path))
    [namespace] = namespaces(tmp_path)
    words = ["--cache_dir", str(tmp_path / "cache"), "--older_than", "0"]
    store = ReferenceStore(tmp_path / "cache", namespace.name, {})
    printed = said(capsys, "prune", *words)
    assert f"kept, a run is using it: {namespace.name}" in printed
    assert "freed 0 bytes" in printed
    assert len(shards(tmp_path)) == 1
    del store
    assert f"removed {namespace.name}" in said(capsys, "prune", *words)


def test_prune_and_export_ask_for_one_that_is_there(tmp_path, capsys):
    train(tiny_config(tmp_path))
    cache = ["--cache_dir", str(tmp_path / "cache")]
    [namespace] = namespaces(tmp_path)
    error = refused(capsys, "prune", *cache, "--namespace", "../cache")
    assert (
        f"namespace is '../cache', which no name begins with; they are: {namespace.name}" in error
    )
    assert "older_than" in refused(capsys, "prune", *cache)
    train(tiny_config(tmp_path, forward_layout="separate", output_dir=tmp_path / "b"))
    output = ["--output", str(tmp_path / "x.parquet")]
    assert "there are 2" in refused(capsys, "export", *cache, *output)
    assert ".parquet" in refused(capsys, "export", *cache, "--output", "x.csv")


# ---------------------------------------------------------------- export


def test_export_has_the_values_that_score_computes(tmp_path, capsys):
    result = train(tiny_config(tmp_path, test_size=4))
    train(tiny_config(tmp_path, forward_layout="separate", output_dir=tmp_path / "b"))
    output = tmp_path / "out" / "x.parquet"
    words = ["--rows_of", str(result.folder.config), "--output", str(output)]
    assert "42 answers" in said(capsys, "export", *words)
    table = pq.read_table(output).to_pydict()
    assert table["dataset"] == ["train"] * 34 + ["held_out"] * 8
    assert table["role"] == ["chosen", "rejected"] * 21
    rows = dict(zip(zip(table["row_id"], table["role"], strict=True), table["sum"], strict=True))
    score(
        ScoreConfig(
            model_name_or_path=str(tmp_path / "model"),
            dataset_name=str(tmp_path / "pairs.jsonl"),
            mixed_precision="fp32",
            output=str(tmp_path / "scores.parquet"),
            progress="none",
        )
    )
    scores = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    assert len(rows) == 2 * len(scores["row_id"]) == 42
    for side in ("chosen", "rejected"):
        for row, value in zip(scores["row_id"], scores[f"logps_{side}"], strict=True):
            assert rows[row, side] == pytest.approx(value, abs=1e-4)
    for tokens, total in zip(table["per_token"], table["sum"], strict=True):
        assert sum(tokens) == pytest.approx(total, abs=1e-6)
    assert "which exists" in refused(capsys, "export", *words)

    everything = tmp_path / "all.parquet"
    cache = ["--cache_dir", str(tmp_path / "cache"), "--output", str(everything)]
    namespace = result.manifest["reference_namespace"]
    said(capsys, "export", *cache, "--namespace", namespace)
    by_key = pq.read_table(everything).to_pydict()
    assert list(by_key) == ["key", "sum", "per_token"]
    assert dict(zip(by_key["key"], by_key["sum"], strict=True)) == dict(
        zip(table["key"], table["sum"], strict=True)
    )


# ---------------------------------------------------------------- the command


def test_help_names_every_command_and_others_are_refused(capsys):
    listed = said(capsys, "--help")
    for command in ("build", "show", "verify", "prune", "export"):
        assert f"preftune cache {command}" in listed
        assert said(capsys, command, "--help").startswith("usage: preftune cache")
    assert "cache clean is not a command" in refused(capsys, "clean")
