"""Sources tokenised once: shards, reuse, kills, several processes, broken and full caches."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from preftune.data import tokenized as module
from preftune.data.formats.row import renamed
from preftune.data.pairs import load_pairs
from preftune.data.sources import open_source
from preftune.data.tokenized import Recipe, tokenize_source, tokenizer_fingerprint
from preftune.data.transforms import load_transforms
from preftune.errors import CacheError, DataError
from tests.tiny import chat_row, make_pairs, tiny_tokenizer, write_jsonl


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 16)
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 5)


def recipe(**changes: Any) -> Recipe:
    parts = {"tokenizer": tiny_tokenizer(), "column_map": {}, "transforms": load_transforms(())}
    return Recipe(**(parts | changes))


def tokenize(path: Path, cache: Path | None, **changes: Any) -> module.Tokenized:
    return tokenize_source(open_source(str(path), "train"), recipe(), cache=cache, **changes)


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows given to the tokenizer from now on."""
    seen: list[int] = []
    call = module.PairTokenizer.__call__

    def counted(self: Any, examples: Any) -> Any:
        seen.append(len(examples))
        return call(self, examples)

    monkeypatch.setattr(module.PairTokenizer, "__call__", counted)
    return seen


def test_a_second_run_tokenises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(50))
    first = tokenize(path, tmp_path / "cache")
    encoded = count_encoded(monkeypatch)
    second = tokenize(path, tmp_path / "cache")
    assert (first.reused, second.reused, encoded) == (False, True, [])
    assert second.table.equals(first.table)
    assert len(first.table) == 50
    assert len(list((tmp_path / "cache").glob("*/shard-*.arrow"))) == 4


def test_the_same_content_elsewhere_is_reused(tmp_path: Path) -> None:
    rows = make_pairs(20)
    tokenize(write_jsonl(tmp_path / "a" / "d.jsonl", rows), tmp_path / "cache")
    assert tokenize(write_jsonl(tmp_path / "b" / "d.jsonl", rows), tmp_path / "cache").reused


def test_rows_are_named_after_the_file_they_are_read_from(tmp_path: Path) -> None:
    rows = make_pairs(3)
    tokenize(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "cache")
    again = tokenize(write_jsonl(tmp_path / "b.jsonl", rows), tmp_path / "cache")
    assert again.table.column("row_id")[0].as_py() == "b.jsonl:1"


def test_whatever_decides_the_tokens_decides_the_key(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(3))
    other = write_jsonl(tmp_path / "o" / "d.jsonl", make_pairs(3, seed=1))
    template = tiny_tokenizer()
    template.chat_template = str(template.chat_template) + " "
    added = tiny_tokenizer()
    added.add_tokens(["zzz"])
    source = open_source(str(path), "train")
    keys = [
        recipe().key(source, None),
        recipe().key(open_source(str(other), "train"), None),
        recipe().key(source, 2),
        recipe(column_map={"chosen": "rejected", "rejected": "chosen"}).key(source, None),
        recipe(transforms=load_transforms(["swap_sides"])).key(source, None),
        recipe(transforms=load_transforms(["swap_sides", "drop_system"])).key(source, None),
        recipe(transforms=load_transforms(["drop_system", "swap_sides"])).key(source, None),
        recipe(tokenizer=template).key(source, None),
        recipe(tokenizer=added).key(source, None),
    ]
    assert len(set(keys)) == len(keys)
    assert recipe().key(open_source(str(path), "train"), None) == keys[0]


def test_a_tokenizer_that_was_used_keeps_its_fingerprint() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["some text", "more"], add_special_tokens=False)
    assert tokenizer_fingerprint(tokenizer) == before


def test_a_pass_that_stopped_goes_on_after_its_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_pairs(60)
    rows[40] = {"prompt": 3, "chosen": "a", "rejected": "b"}
    broken = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match=r"d\.jsonl:41"):
        tokenize(broken, tmp_path / "cache")
    shards = sorted((tmp_path / "cache").glob("*/*"))
    assert [path.name for path in shards] == ["shard-00000.arrow", "shard-00001.arrow"]
    # The same rows again, as after a kill: the key is made to stay.
    whole = write_jsonl(tmp_path / "w" / "d.jsonl", [*rows[:40], *make_pairs(20, seed=5)])
    monkeypatch.setattr(Recipe, "key", lambda *_: shards[0].parent.name)
    encoded = count_encoded(monkeypatch)
    seen: list[int] = []
    resumed = tokenize(whole, tmp_path / "cache", progress=lambda done, _: seen.append(done))
    assert sum(encoded) == 60 - 32
    assert seen == sorted(seen)
    assert seen[-1] == 60
    monkeypatch.undo()
    assert resumed.table.equals(tokenize(whole, None).table)


def test_a_killed_process_leaves_whole_shards_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(3000))
    code = (
        "from tests.unit.data import test_tokenized as t; import pathlib; "
        "t.module.ROWS_PER_SHARD = 64; "
        f"t.tokenize(pathlib.Path({str(path)!r}), pathlib.Path({str(tmp_path / 'cache')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache").glob("*/shard-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    shards = sorted((tmp_path / "cache").glob("*/shard-*"))
    assert len(shards) >= 3
    for shard in shards:
        assert len(pa.ipc.open_file(pa.memory_map(str(shard))).read_all()) == 64
    assert not list((tmp_path / "cache").glob("*/complete.json"))


@pytest.mark.slow
def test_several_processes_make_the_same_table(tmp_path: Path) -> None:
    rows = make_pairs(70)
    rows[30] = chat_row("q", "same", "same")
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    alone = tokenize(path, tmp_path / "one")
    together = tokenize(path, tmp_path / "two", num_proc=2)
    assert together.table.equals(alone.table)
    rows[50] = {"prompt": 3, "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"d\.jsonl:51"):
        tokenize(write_jsonl(tmp_path / "e" / "d.jsonl", rows), tmp_path / "two", num_proc=2)


def test_without_a_cache_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(40))
    made = tokenize(path, None)
    assert not list((tmp_path / "scratch").iterdir())
    assert not made.reused
    assert made.table.equals(tokenize(path, tmp_path / "cache").table)


def test_a_damaged_shard_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(40))
    tokenize(path, tmp_path / "cache")
    shard = sorted((tmp_path / "cache").glob("*/shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CacheError, match=r"shard-00001\.arrow.*delete the folder"):
        tokenize(path, tmp_path / "cache")


def test_rows_of_a_further_source_keep_its_name(tmp_path: Path) -> None:
    rows = make_pairs(4)
    rows[2]["source"] = "forum"
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = load_pairs(str(path), tokenizer=tiny_tokenizer())
    assert [e.source for e in data.examples] == [str(path), str(path), "forum", str(path)]


def test_columns_are_renamed_before_transforms() -> None:
    raw = {"q": 1, "good": 2, "bad": 3, "chosen": "old", "rest": 4}
    mapping = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    row = renamed("f:1", raw, "f", mapping)
    assert row == {"prompt": 1, "chosen": 2, "rejected": 3, "rest": 4}
    with pytest.raises(DataError, match="which this row lacks"):
        renamed("f:1", {"good": 1}, "f", mapping)
