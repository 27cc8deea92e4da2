"""The config file and the command line: what wins, and the text of each mistake."""

import pytest

from preftune import __version__
from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config, parse_with_places
from preftune.config.quickstart import QuickstartConfig
from preftune.errors import ConfigError
from preftune.losses.spec import DPOLossType

LOSSES = f"{', '.join(DPOLossType)}, a list of them or null"
NEEDED = ("--model_name_or_path", "m", "--dataset_name", "d")


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read a command line, with an optional config.yaml in front."""
    monkeypatch.chdir(tmp_path)

    def read_config(*argv, yaml=None):
        if yaml is not None:
            (tmp_path / "config.yaml").write_text(yaml, encoding="utf-8")
            argv = ("config.yaml", *argv)
        return parse_config(ExperimentConfig, [*argv, *NEEDED])

    return read_config


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(read):
    config = read("--beta", "0.3", "--seed=7", yaml="beta: 0.2\nlearning_rate: 2e-6\n")
    assert (config.beta, config.seed, config.learning_rate) == (0.3, 7, 2e-6)
    assert config.logging_steps == 10


def test_a_value_of_the_file_that_the_command_line_replaces_is_not_judged(read):
    assert read("--beta", "0.3", yaml="beta: zero\n").beta == 0.3


def test_words_mean_what_the_field_says(read):
    config = read(
        yaml="mixed_precision: no\nshuffle: off\ndisable_dropout: yes\nmodel_revision: 010\n"
        "learning_rate: '5e-7'\nloss_type: simpo\nprogress: none\nmax_length: ~\ncache_dir: no\n"
        "column_map: {prompt: yes, chosen: 1}\ntokenizer_name_or_path: 'null'\ndata_seed:\n"
    )
    assert config.mixed_precision == "fp32"
    assert (config.shuffle, config.disable_dropout) == (False, True)
    assert (config.model_revision, config.cache_dir) == ("010", "no")
    assert config.learning_rate == 5e-7
    assert config.loss_type is DPOLossType.SIMPO
    assert (config.progress, config.max_length, config.data_seed) == ("none", None, None)
    assert config.column_map == {"prompt": "yes", "chosen": "1"}
    assert config.tokenizer_name_or_path == "null"


def test_switches_mappings_and_null_on_the_command_line(read):
    argv = ["--gradient_checkpointing", "--shuffle", "false", "--column_map", "{prompt: question}"]
    config = read(*argv, "--max_grad_norm", "null", "--concatenated_forward=no", "--cache_dir=-x=y")
    assert (config.gradient_checkpointing, config.shuffle) == (True, False)
    assert config.column_map == {"prompt": "question"}
    assert config.max_grad_norm is None
    assert config.wanted_layout == "separate"
    assert config.cache_dir == "-x=y"


def test_a_switch_leaves_the_config_file_alone(read, tmp_path):
    (tmp_path / "c.yaml").write_text("beta: 0.7\n", encoding="utf-8")
    config = read("--gradient_checkpointing", "c.yaml")
    assert (config.gradient_checkpointing, config.beta) == (True, 0.7)


def test_an_empty_file_or_one_of_comments_sets_nothing(read):
    assert read(yaml="") == read(yaml="# nothing\n") == read()


def test_the_file_may_start_with_a_byte_order_mark(read):
    assert read(yaml="\ufeffbeta: 0.7\n").beta == 0.7


def test_places_of_given_values_are_known(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("\nbeta: 0.7\nseed: 1\n", encoding="utf-8")
    given = parse_with_places(ExperimentConfig, [str(path), "--seed", "2", *NEEDED]).given
    assert given["beta"].place == f"{path} line 2"
    assert given["seed"].place == "command line"
    assert "learning_rate" not in given


# (file, command line, the whole text)
MISTAKES = {
    "typo_flag": (
        None,
        "--learning_rat 1e-6",
        ["command line: --learning_rat is not an option; did you mean --learning_rate?"],
    ),
    "abbreviation": (
        None,
        "--adam_b 0.9",
        ["command line: --adam_b is not an option; did you mean --adam_beta1 or --adam_beta2?"],
    ),
    "dashes": (
        None,
        "--learning-rate=1e-6",
        ["command line: --learning-rate is not an option; did you mean --learning_rate?"],
    ),
    "one_dash": (
        None,
        "-beta 1",
        ["command line: -beta is not an option; did you mean --beta?"],
    ),
    "nothing_near": (
        None,
        "--zzz=1",
        ["command line: --zzz is not an option; see --help for all"],
    ),
    "typo_key": (
        "seed: 1\nlearning_rat: 1e-6\n",
        "",
        ["config.yaml line 2: learning_rat is not an option; did you mean learning_rate?"],
    ),
    "wrong_enum": (
        "loss_type: simpoo\n",
        "",
        [f"config.yaml line 1: loss_type is 'simpoo'; it must be {LOSSES}"],
    ),
    "wrong_type": (
        "seed: 1\n\nlearning_rate: abc\n",
        "",
        ["config.yaml line 3: learning_rate is 'abc'; it must be a finite number or null"],
    ),
    "beta_zero": (
        None,
        "--beta 0",
        ["command line: --beta is 0.0; it must be a finite number above 0"],
    ),
    "negative": (
        None,
        "--learning_rate -1e-6",
        ["command line: --learning_rate is -1e-06; it must be above 0"],
    ),
    "nan": (
        "num_epochs: .nan\n",
        "--learning_rate nan",
        [
            "config.yaml line 1: num_epochs is '.nan'; it must be a finite number or null",
            "command line: --learning_rate is 'nan'; it must be a finite number or null",
        ],
    ),
    "epochs_and_steps": (
        "num_epochs: 2\n",
        "--max_train_steps 9",
        [
            "config.yaml line 1: num_epochs is 2.0; max_train_steps is given too, and they "
            "exclude each other: leave one out or set it to null"
        ],
    ),
    "another_losss_knob": (
        None,
        "--gamma_beta_ratio 0.5",
        ["command line: --gamma_beta_ratio is 0.5; the loss dpo does not read it, only simpo"],
    ),
    "duplicate_key": (
        "beta: 1\nseed: 1\nbeta: 2\n",
        "",
        ["config.yaml line 3: beta is given twice, first on line 1; keep one"],
    ),
    "duplicate_flag": (
        None,
        "--beta 1 --beta=2",
        ["command line: --beta is given twice, '1' and '2'; keep one"],
    ),
    "no_value": (
        None,
        "--beta --seed 1",
        ["command line: --beta has no value; it must be a finite number or null"],
    ),
    "null": (
        "output_dir: null\n",
        "",
        ["config.yaml line 1: output_dir is null; it must be text"],
    ),
    "nested": (
        "seed: [1, 2]\nbeta: {a: 1}\n",
        "",
        [
            "config.yaml line 1: seed is ['1', '2']; it must be a whole number such as 42",
            "config.yaml line 2: beta is {'a': '1'}; it must be a finite number or null",
        ],
    ),
    "switch": (
        None,
        "--shuffle maybe",
        ["command line: --shuffle is 'maybe'; it must be true or false"],
    ),
    "mapping": (
        None,
        "--column_map {a",
        [
            "command line: --column_map is '{a'; it is not valid YAML: "
            "expected ',' or '}', but got '<stream end>'"
        ],
    ),
    "half_a_number": (
        "learning_rate: 5e-7x\nnum_epochs: .inf\nmax_grad_norm: 1e999\n",
        "",
        [
            "config.yaml line 1: learning_rate is '5e-7x'; it must be a finite number or null",
            "config.yaml line 2: num_epochs is '.inf'; it must be a finite number or null",
            "config.yaml line 3: max_grad_norm is '1e999'; it must be a finite number such as 1.0 "
            "or null",
        ],
    ),
    "eval_steps_1.0": (
        "eval_steps: 1.0\n",
        "--test_size 1",
        [
            "config.yaml line 1: eval_steps is 1.0; with a decimal point it is a part of the run, "
            "which must be below 1; a number of steps is a whole number (1 is every step)"
        ],
    ),
    "two_sources": (
        "dataset_mixer: {a: 1}\n",
        "",
        [
            "command line: --dataset_name is 'd'; dataset_mixer is given too, and they exclude "
            "each other: keep one"
        ],
    ),
    "a_name_twice_in_a_mapping": (
        "column_map: {prompt: a, prompt: b}\n",
        '--eval_dataset {"x":y,"x":z}',
        [
            "config.yaml line 1: column_map names 'prompt' twice; keep one",
            "command line: --eval_dataset is '{\"x\":y,\"x\":z}'; it is a mapping that names 'x' "
            "twice; keep one",
        ],
    ),
    "stage": ("stage: rl\n", "", ["config.yaml line 1: stage is 'rl'; it must be sft or dpo"]),
    "tracker": (
        "report_to: wandbb\n",
        "",
        [
            "config.yaml line 1: report_to is 'wandbb'; it must be tensorboard, wandb, trackio, "
            "mlflow or null"
        ],
    ),
    "transform": (
        None,
        "--dataset_transforms shorten my.rows: a:b:c",
        [
            "command line: --dataset_transforms is ['shorten', 'my.rows:', 'a:b:c']; 'my.rows:' "
            "must be module:function, such as my_package.rows:shorten",
            "command line: --dataset_transforms is ['shorten', 'my.rows:', 'a:b:c']; 'a:b:c' must "
            "be module:function, such as my_package.rows:shorten",
        ],
    ),
    "cache_off": (
        None,
        "--cache_dataset_only --dataset_cache_mode off",
        [
            "command line: --cache_dataset_only is true; dataset_cache_mode is off, so there is no "
            "cache to fill: leave one out"
        ],
    ),
    "newer_file": (
        "seed: 1\npreftune_version: 99.1\n",
        "--seed=-1",
        [
            f"config.yaml line 2: preftune_version is '99.1', which is newer than this preftune, "
            f"{__version__}; upgrade preftune, or remove the line to read it anyway",
            "command line: --seed is -1; it must be from 0 to 4294967295",
        ],
    ),
    "no_version": (
        "preftune_version: new\n",
        "",
        [
            "config.yaml line 1: preftune_version is 'new'; it must be a version such as "
            f"{__version__}, or remove the line"
        ],
    ),
    "version_flag": (
        None,
        "--preftune_version 0.1",
        ["command line: --preftune_version is not an option; see --help for all"],
    ),
    "several": (
        "learning_rate: abc\nbetta: 1\nmixed_precision: bf61\n",
        "--seed=-1 --los simpo --max_length 0",
        [
            "config.yaml line 2: betta is not an option; did you mean beta?",
            "command line: --los is not an option; did you mean --loss_type or --loss_weights?",
            "config.yaml line 1: learning_rate is 'abc'; it must be a finite number or null",
            "config.yaml line 3: mixed_precision is 'bf61'; it must be auto, fp32, bf16 or fp16",
            "command line: --seed is -1; it must be from 0 to 4294967295",
            "command line: --max_length is 0; it must be 2 or more",
        ],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_text_of_a_mistake(read, name):
    yaml, argv, expected = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        read(*argv.split(), yaml=yaml)
    assert caught.value.problems == expected
    assert all(problem in str(caught.value) for problem in expected)


def test_what_cannot_be_read_is_told_once():
    with pytest.raises(ConfigError) as caught:
        parse_config(ExperimentConfig, ["--model_name_or_path", "--dataset_mixer", "{a"])
    assert caught.value.problems == [
        "command line: --model_name_or_path has no value; it must be text or null",
        "command line: --dataset_mixer is '{a'; it is not valid YAML: "
        "expected ',' or '}', but got '<stream end>'",
    ]


def test_words_of_lists_and_mappings_mean_what_the_field_says(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model_name_or_path: m\neval_dataset: {no: off, 1.0: 5e-7}\n"
        "dataset_transforms:\n- no\n- 010\nreport_to: tensorboard\n"
        "dataset_mixer:\n  a.jsonl: 1\n  no: 1.0\n  'null': 5e-1\n  c: '2'\n",
        encoding="utf-8",
    )
    config = parse_config(ExperimentConfig, [str(path)])
    assert config.eval_dataset == {"no": "off", "1.0": "5e-7"}
    assert config.dataset_transforms == ["no", "010"]
    assert config.report_to == ["tensorboard"]
    assert repr(config.dataset_mixer) == "{'a.jsonl': 1, 'no': 1.0, 'null': 0.5, 'c': 2}"


MIXED = [
    ["--dataset_mixer", "{a.jsonl: 1, b.jsonl: 1.0}"],
    ["--dataset_mixer_list", "a.jsonl", "1", "b.jsonl", "1.0"],
    ["--dataset_mixer_list", "[a.jsonl, 1, b.jsonl, 1.0]"],
    ["--dataset_mixer_list=[a.jsonl, 1, b.jsonl, 1.0]"],
]


@pytest.mark.parametrize("argv", MIXED, ids=str)
def test_one_row_and_all_rows_are_told_apart_on_the_command_line(argv, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model_name_or_path: m\n", encoding="utf-8")
    for words in ([str(file), *argv], [*argv, str(file)], [*argv, "--seed", "1", str(file)]):
        config = parse_config(ExperimentConfig, words)
        assert repr(config.sources) == "(('a.jsonl', 1), ('b.jsonl', 1.0))"


def test_lists_on_the_command_line(read):
    config = read("--dataset_transforms", "one", "my.rows:two", "--report_to=tensorboard")
    assert config.dataset_transforms == ["one", "my.rows:two"]
    assert config.report_to == ["tensorboard"]
    for words in (["none"], ["[]"], ["null"]):
        assert read("--report_to", *words).report_to is None
    assert read("--dataset_transforms", "one, two").dataset_transforms == ["one, two"]
    assert read("--eval_dataset", "e.jsonl").eval_sources == {"": "e.jsonl"}
    assert read("--eval_dataset", "{a: e.jsonl}").eval_sources == {"a": "e.jsonl"}


@pytest.mark.parametrize("version", ["0.0.1", "0.1.0.dev1", __version__])
def test_files_of_this_version_and_older_ones_are_read(read, version):
    assert read(yaml=f"preftune_version: {version}\nseed: 3\n").seed == 3


def test_what_is_required_is_asked_for():
    with pytest.raises(ConfigError) as caught:
        parse_config(ExperimentConfig, [])
    assert caught.value.problems == [
        "model_name_or_path is not set; it must name a model on the Hugging Face Hub, a folder "
        "or a GGUF file",
        "dataset_name is not set; it must name a file, a folder or a dataset on the Hugging Face "
        "Hub; or give dataset_mixer or dataset_mixer_list",
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a: [1\nb: 2", "config.yaml line 2: not valid YAML: expected ',' or ']', but got ':'"),
        (b"- 1\n", "config.yaml line 1: the file must hold a mapping, one `key: value` a line"),
        (b"just words", "config.yaml line 1: the file must hold a mapping"),
        (b"seed: \x01", "config.yaml: not valid YAML: unacceptable character"),
        (b"seed: \xff", "config.yaml: the config file is not UTF-8 text"),
        (b"seed: 1\n---\nseed: 2", "not valid YAML: but found another document"),
        (b"seed: &x [*x]", "config.yaml line 1: seed is [[[["),
        (b"? [1]\n: 2", "config.yaml line 1: ['1'] is not an option"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, monkeypatch, content, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parse_config(ExperimentConfig, ["config.yaml"])
    assert text in str(caught.value)


def test_a_missing_file_a_folder_and_two_files_are_refused(read, tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml: .* cannot be read: No such file"):
        read("no.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read(str(tmp_path))
    with pytest.raises(ConfigError, match=r"only one config file can be given, not a\.yaml, b"):
        read("a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match=r"'a\.yaml' belongs to no option"):
        parse_config(QuickstartConfig, ["a.yaml"], allow_file=False)


def test_quiet_is_a_word_for_no_progress():
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--quiet"]
    assert parse_config(ExperimentConfig, words).progress == "none"
    with pytest.raises(ConfigError, match="--progress is given twice, 'rich' and 'none'; keep one"):
        parse_config(ExperimentConfig, ["--progress", "rich", *words])


def test_a_list_of_tasks_may_hold_yaml_files_behind_the_config_file(read):
    options = ("--eval_jobs", "lm_eval", "--eval_tasks", "arc_easy", "mine.yaml", "b.yaml")
    config = read(*options, "--seed", "3", yaml="beta: 0.7\n")
    assert config.eval_tasks == ["arc_easy", "mine.yaml", "b.yaml"]
    assert (config.beta, config.seed) == (0.7, 3)
