"""Files made to run code or to reach outside do neither.

Each payload would create a file named `marker`; each command ends with exit code 2, or works as if
the payload were plain text.
"""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from preftune import train
from preftune.cli.main import main
from preftune.training.run_folder import RunFolder
from tests.runs import arguments, edit_state, reseal, tiny_config, tiny_settings
from tests.tiny import CHATML, make_pairs, tiny_model, tiny_tokenizer, write_jsonl


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that a payload would create; the working folder is one where nothing may appear."""
    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.chdir(outside)
    yield outside / "marker"
    assert sorted(outside.iterdir()) == []


class Payload:
    """What pickle runs when it reads this."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def refused(capsys, words, says=""):
    """The command ends with exit code 2 and its reason, and with no traceback."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert says in error
    return error


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "text",
    [
        "beta: !!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/apply:os.system ['touch {marker}']",
        "model_name_or_path: !!python/object/new:os.system ['touch {marker}']",
        "column_map: {{a: !!python/object/apply:os.system ['touch {marker}']}}",
        "? !!python/object/apply:os.system ['touch {marker}']\n: 1",
        "beta: !!python/name:os.system",
        "beta: !!python/module:os",
        "<<: !!python/object/apply:os.system ['touch {marker}']",
    ],
)
def test_yaml_tags_build_nothing(tmp_path, marker, capsys, text):
    config = tmp_path / "config.yaml"
    config.write_text(text.format(marker=marker) + "\n")
    refused(capsys, ["train", str(config), *arguments(tiny_settings(tmp_path))])
    value = f"{{a: !!python/object/apply:os.system ['touch {marker}']}}"
    refused(capsys, ["train", *arguments(tiny_settings(tmp_path)), "--column_map", value])


@pytest.mark.parametrize("kind", ["aliases", "nesting", "inline"])
def test_yaml_that_grows_without_end_is_refused(tmp_path, capsys, kind):
    wide = "\n".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 300)}]" for i in range(6)
    )
    text = wide if kind == "aliases" else "beta: " + "[" * 100_000
    config = tmp_path / "config.yaml"
    config.write_text(text + "\n")
    if kind == "inline":
        words = ["--column_map", "{a: " + "[" * 100_000]
        refused(capsys, ["train", *arguments(tiny_settings(tmp_path)), *words])
    else:
        refused(capsys, ["train", str(config)])


@pytest.mark.parametrize("key", ["run_name", "exp_name"])
@pytest.mark.parametrize("name", ["../../marker", "/etc/passwd", "a\\..\\b", "a\x00b", "a\nb"])
def test_names_of_runs_are_no_paths(tmp_path, marker, capsys, key, name):
    refused(capsys, ["train", *arguments(tiny_settings(tmp_path) | {key: name})], key)


# ---------------------------------------------------------------- data


def test_rows_full_of_paths_and_pickles_are_text(tmp_path, marker):
    payload = pickle.dumps(Payload(marker))
    rows = make_pairs(21, seed=0)
    for row in rows:
        row["source"] = "../../../outside/marker"
        row["chosen"][0]["content"] += f" {{{{ cycler }}}} {payload!r} !!python/name:os.system"
    data = write_jsonl(tmp_path / "..rows; touch marker.jsonl", rows)
    result = train(tiny_config(tmp_path, dataset_name=data, test_size=3))
    assert result.manifest["status"] == "finished"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("outside", "model", "pairs.jsonl", data.name, "run", "cache"),
    }


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "arrow.extension", "pandas"])
def test_types_of_parquet_files_are_not_unpickled(tmp_path, marker, capsys, name):
    """pyarrow once made extension types by unpickling their description."""
    metadata = {
        b"ARROW:extension:name": name.encode(),
        b"ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    rows = [{k: row[k][0]["content"] for k in ("prompt", "chosen", "rejected")} for row in PAIRS]
    table = pa.Table.from_pylist(rows)
    fields = [field.with_metadata(metadata) for field in table.schema]
    schema = pa.schema(fields, {b"pandas": pickle.dumps(Payload(marker))})
    path = tmp_path / "rows.parquet"
    pq.write_table(table.cast(schema), path)
    assert train(tiny_config(tmp_path, dataset_name=path)).manifest["status"] == "finished"


PAIRS = make_pairs(21, seed=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.jsonl", b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"),
        ("deep.json", b"[" * 200_000),
        ("number.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": ' + b"9" * 10_000 + b"}\n"),
        ("weight.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": 1e999}\n'),
        ("nul.csv", b"prompt,chosen,rejected\n\x00,\x00,\x00\n"),
        ("junk.parquet", b"PAR1" + b"\xff" * 64 + b"PAR1"),
        ("huge.parquet", b"PAR1" + b"\x15\x04" * 8 + struct.pack("<I", 2**31) + b"PAR1"),
        ("bomb.jsonl.gz", b"\x1f\x8b\x08\x00" + b"\x00" * 40),
        ("rows.pkl", b"PAYLOAD"),
        ("rows.npy", b"PAYLOAD"),
        ("rows.pt", b"PAYLOAD"),
    ],
)
def test_crafted_data_is_refused(tmp_path, marker, capsys, name, content):
    payload = pickle.dumps(Payload(marker))
    (tmp_path / name).write_bytes(payload if content == b"PAYLOAD" else content)
    settings = tiny_settings(tmp_path, dataset_name=tmp_path / name)
    refused(capsys, ["train", *arguments(settings)], name)


def test_a_transform_runs_code_and_only_by_the_users_own_option(tmp_path, capsys):
    """`dataset_transforms` names Python code on purpose; what a row holds never names any."""
    rows = [row | {"dataset_transforms": ["os:system"], "stage": "x"} for row in PAIRS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert train(tiny_config(tmp_path, dataset_name=data)).manifest["status"] == "finished"


# ---------------------------------------------------------------- chat templates

REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0]() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ strftime_now.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ (messages|attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__base__}'.format(messages) }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages.pop() }}",
]


@pytest.mark.parametrize("text", REACHING)
@pytest.mark.parametrize("of", ["option", "tokenizer"])
def test_templates_cannot_reach_python(tmp_path, marker, capsys, text, of):
    template = text.replace("MARKER", str(marker)) + CHATML
    settings = tiny_settings(tmp_path)
    if of == "option":
        (tmp_path / "evil.jinja").write_text(template)
        settings["chat_template"] = str(tmp_path / "evil.jinja")
    else:
        tiny_tokenizer(template).save_pretrained(tmp_path / "model")
    refused(capsys, ["check", *checked(settings)])


def checked(settings):
    return arguments({k: v for k, v in settings.items() if k != "progress"})


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(10 ** 12) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * (10 ** 8) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x'.rjust(10 ** 30) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ undefined_function() }}",
        "{% for %}",
    ],
)
def test_templates_that_loop_grow_or_fail_are_refused_in_time(
    tmp_path, marker, capsys, text, monkeypatch
):
    monkeypatch.setattr("preftune.data.chat.MOST_SECONDS", 0.5)
    (tmp_path / "evil.jinja").write_text(text + CHATML)
    settings = tiny_settings(tmp_path, chat_template=tmp_path / "evil.jinja")
    refused(capsys, ["check", *checked(settings)])


# ---------------------------------------------------------------- models


def test_pickled_weights_are_not_read(tmp_path, marker, capsys):
    settings = tiny_settings(tmp_path)
    model = tmp_path / "model"
    (model / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(Payload(marker)))
    refused(capsys, ["train", *arguments(settings)], "save it again with safetensors")
    # Even real weights, and even where an index names them.
    torch.save(tiny_model().state_dict(), model / "pytorch_model.bin")
    refused(capsys, ["train", *arguments(settings)], "save it again with safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, ["train", *arguments(settings)])


def test_an_index_of_weights_does_not_reach_outside(tmp_path, marker, capsys):
    settings = tiny_settings(tmp_path)
    model = tmp_path / "model"
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, ["train", *arguments(settings)], "outside")


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Evil: pass\n"


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_of_a_model_folder_does_not_run(tmp_path, marker, capsys, model_type):
    settings = tiny_settings(tmp_path)
    model = tmp_path / "model"
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(CODE.format(marker=str(marker)))
    for file in ("config.json", "tokenizer_config.json"):
        document = json.loads((model / file).read_text())
        document["auto_map"] = {name: "modeling_evil.Evil" for name in names}
        document |= {"model_type": model_type} if file == "config.json" else {}
        document["auto_map"]["AutoTokenizer"] = ["tokenization_evil.Evil", None]
        (model / file).write_text(json.dumps(document))
    if model_type == "llama":  # transformers knows it by itself, and takes its own class
        assert main(["train", *arguments(settings)]) == 0
    else:
        refused(capsys, ["train", *arguments(settings)], "model_name_or_path")


def test_a_model_does_not_choose_code_for_its_attention(tmp_path, marker, capsys):
    """transformers takes a name with a slash for a repository of kernels, and runs its code."""
    settings = tiny_settings(tmp_path)
    file = tmp_path / "model" / "config.json"
    document = json.loads(file.read_text())
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        file.write_text(json.dumps(document | {key: "someone/kernel"}))
        code = main(["train", *arguments(settings | {"output_dir": str(tmp_path / key)})])
        error = capsys.readouterr().err
        assert code in (0, 2), error
        assert code == 0 or "someone/kernel" in error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"JUNK" * 100,
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + b"key",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 3) + b"key\xff\xff\xff\xff",
        b"GGUF" + struct.pack("<IQQ", 99, 1, 1),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"\xff" + b"\x00" * 12,
    ],
)
def test_a_broken_gguf_is_the_users_error(tmp_path, marker, capsys, content):
    (tmp_path / "model.gguf").write_bytes(content)
    settings = tiny_settings(tmp_path, model_name_or_path=tmp_path / "model.gguf")
    refused(capsys, ["train", *arguments(settings)], "model_name_or_path")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"model_type": "llama", "vocab_size": -1}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "../x"}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", '{"tokenizer_class": "os.system"}'),
        ("generation_config.json", "[]"),
    ],
)
def test_crafted_files_of_a_model_are_the_users_error(tmp_path, marker, capsys, file, content):
    settings = tiny_settings(tmp_path)
    (tmp_path / "model" / file).write_text(content)
    code = main(["train", *arguments(settings)])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    # transformers ignores a tokenizer class and generation settings that it cannot use.
    assert code == 2 or (code == 0 and file in ("tokenizer_config.json", "generation_config.json"))


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    train(tiny_config(root, checkpointing_steps=2, loss_type="beta_dpo"))
    return root


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A checkpoint of step 4 to tamper with, in a run that was stopped there."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    folder = RunFolder(tmp_path / "run")
    shutil.rmtree(folder.checkpoint(6))
    folder.write_manifest(folder.read_manifest() | {"status": "running"})
    return folder.checkpoint(4)


def going_on(trained, run):
    options = {"checkpointing_steps": 2, "loss_type": "beta_dpo", "output_dir": str(run)}
    return ["train", *arguments(tiny_settings(trained, **options))]


BIG = 10**30


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", BIG),
        ("step", "4; touch marker"),
        ("step", None),
        ("step", 10**7),
        ("metrics_offset", -1),
        ("metrics_offset", BIG),
        ("metrics_offset", 2**62),
        ("metrics_offset", "../../outside/marker"),
        ("metrics_offset", 1.5),
        ("num_tokens", -1),
        ("num_tokens", "x"),
        ("num_tokens", BIG),
        ("running", "x"),
        ("running", [["a"]]),
        ("running", {"a": 1}),
        ("window", []),
        ("window", {"loss": "x"}),
        ("window", {"../x": [1, 2, 3]}),
        ("guards", {"skipped_steps": "x"}),
        ("guards", [1]),
        ("identity", []),
        ("config", []),
        ("config", "x"),
    ],
)
def test_crafted_numbers_of_a_checkpoint_are_refused(trained, checkpoint, capsys, key, value):
    metrics = (checkpoint.parent.parent / "metrics.jsonl").read_bytes()
    edit_state(checkpoint, **{key: value})
    refused(capsys, going_on(trained, checkpoint.parent.parent), str(checkpoint))
    assert (checkpoint.parent.parent / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("name", ["model", "optimizer", "rng"])
@pytest.mark.parametrize("how", ["names", "header", "shapes", "pickle", "empty"])
def test_crafted_tensors_of_a_checkpoint_are_refused(
    trained, checkpoint, tmp_path, marker, capsys, name, how
):
    path = checkpoint / f"{name}.safetensors"
    tensors = load_file(path)
    match how:
        case "names":
            save_file({f"../../outside/{key}": t for key, t in tensors.items()}, path)
        case "header":
            path.write_bytes(struct.pack("<Q", 2**60) + b"{}" * 100)
        case "shapes":
            save_file({key: torch.zeros(3) for key in tensors}, path)
        case "pickle":
            path.write_bytes(pickle.dumps(Payload(marker)))
        case "empty":
            save_file({}, path)
    reseal(checkpoint)
    refused(capsys, going_on(trained, checkpoint.parent.parent), str(checkpoint))


def test_links_in_a_run_lead_nothing_outside_to_harm(trained, checkpoint, tmp_path, capsys):
    """Links to a folder and to a file outside: retention and saving leave those as they are."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "state.json").write_text("{}")
    (kept / "precious").write_text("precious")
    run = checkpoint.parent.parent
    (checkpoint.parent / "step-00000001").symlink_to(kept)
    (checkpoint.parent / ".deleted-step-00000003").symlink_to(kept)
    (checkpoint.parent / ".partial-step-00000006").symlink_to(kept)
    (run / "final").symlink_to(kept)
    (run / ".partial-final").symlink_to(kept)
    assert main([*going_on(trained, run), "--keep_last_n_checkpoints", "1"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert (kept / "precious").read_text() == "precious"
    assert (kept / "state.json").read_text() == "{}"
    assert len(list(kept.iterdir())) == 2
