"""The config file and the command line: what wins, and the text of each mistake."""

import pytest

from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config, parse_with_places
from preftune.config.quickstart import QuickstartConfig
from preftune.errors import ConfigError
from preftune.losses.spec import DPOLossType

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
    assert config.layout == "separate"
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
        ["config.yaml line 1: loss_type is 'simpoo'; it must be dpo, dpo_norm, simpo or wpo"],
    ),
    "wrong_type": (
        "seed: 1\n\nlearning_rate: abc\n",
        "",
        ["config.yaml line 3: learning_rate is 'abc'; it must be a finite number such as 5e-07"],
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
            "command line: --learning_rate is 'nan'; it must be a finite number such as 5e-07",
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
    "several": (
        "learning_rate: abc\nbetta: 1\nmixed_precision: bf61\n",
        "--seed=-1 --los simpo --max_length 0",
        [
            "config.yaml line 2: betta is not an option; did you mean beta?",
            "command line: --los is not an option; did you mean --loss_type?",
            "config.yaml line 1: learning_rate is 'abc'; it must be a finite number such as 5e-07",
            "config.yaml line 3: mixed_precision is 'bf61'; it must be auto, fp32 or bf16",
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
