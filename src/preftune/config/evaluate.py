"""The options of `preftune evaluate`."""

import re
from dataclasses import dataclass
from typing import Literal

from preftune.config.composed import ComposedConfig
from preftune.config.jobs import YAML_OPTIONS, JobsConfig
from preftune.config.logging import Progress
from preftune.config.problem import Problem, count, listed
from preftune.config.section import Section

JudgeName = Literal["openai", "reward_model", "function"]
_JUDGE_NEEDS: dict[str, tuple[str, ...]] = {
    "openai": ("judge_model", "judge_base_url"),
    "reward_model": ("judge_model",),
    "function": ("judge_function",),
}
_NAMES = {
    "judge_model": "the model that judges",
    "judge_base_url": "where the endpoint is, such as http://localhost:8000/v1",
    "judge_function": "a function, as module:function",
}
_OF_JUDGE = (*_NAMES, "judge_prompts", "judge_num_prompts", "judge_max_new_tokens")
_MODULE_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(kw_only=True)
class EvaluatingConfig(Section):
    """What is compared, and where results go."""

    eval_base: str | None = None
    """The model to compare with: a folder or a name on the Hub. Unset: what the run, or the
    adapter, started from; for another model none."""

    model_revision: str | None = None
    """Branch, tag or commit of MODEL, where it is a name on the Hub."""

    output: str | None = None
    """Folder for results. Unset: evaluation/ in the run's folder; for another model it must be
    given."""

    hub_repo_id: str | None = None
    """Where the job beaker finds the model on the Hub. Unset: where the run pushed it, or MODEL."""

    trust_remote_code: bool = False
    """Run Python code that comes with the models. A run's own answer to this does not count."""

    cache_dir: str | None = None
    """Folder that keeps results of models that several runs start from. Unset: $PREFTUNE_CACHE, or
    ~/.cache/preftune."""

    dry_run: bool = False
    """Print what would run or be submitted, and end."""

    progress: Progress = "auto"
    """What the terminal shows. rich: a live bar; plain: lines; none: nothing; auto: rich in a
    terminal, else plain."""


@dataclass(kw_only=True)
class JudgeConfig(Section):
    """Win rate: how often a judge prefers answers of the trained model."""

    judge: JudgeName | None = None
    """Who compares answers. openai: a model behind an OpenAI-compatible endpoint, whose key, if it
    needs one, is in OPENAI_API_KEY; reward_model: a sequence classifier with one score; function: a
    Python function of yours. Unset: nobody."""

    judge_model: str | None = None
    """openai: the model's name at the endpoint; reward_model: a folder or a name on the Hub."""

    judge_base_url: str | None = None
    """openai: address of the endpoint, to which /chat/completions is added."""

    judge_function: str | None = None
    """function: module:function, called with (prompt, answer_a, answer_b); gives "A", "B" or
    "tie", or a number: above 0 where A is better, below 0 where B is."""

    judge_prompts: str | None = None
    """Prompts that both models answer: a file (.jsonl, .json, .parquet, .csv) whose column prompt
    has text, one turn of the user, or messages. Unset: the run's held-out prompts."""

    judge_num_prompts: int | None = None
    """At most this many prompts, the first, 1 or more. Unset: all."""

    judge_max_new_tokens: int | None = None
    """Most tokens of an answer, 1 or more. Unset: 512."""

    def __post_init__(self) -> None:
        """Fill the length of answers."""
        if self.judge is not None and self.judge_max_new_tokens is None:
            self.judge_max_new_tokens = 512

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        if self.judge is None:
            message = f"nobody judges: add --judge {listed(list(_JUDGE_NEEDS))}, or leave it out"
            return [
                Problem(key, value, message, ("judge",))
                for key in _OF_JUDGE
                if (value := getattr(self, key)) is not None
            ]
        found = count("judge_num_prompts", self.judge_num_prompts)
        found += count("judge_max_new_tokens", self.judge_max_new_tokens)
        for key, what in _NAMES.items():
            value = getattr(self, key)
            if key in _JUDGE_NEEDS[self.judge]:
                if value is None:
                    message = f"judge is {self.judge}, so it must name {what}"
                    found.append(Problem(key, None, message, ("judge",)))
            elif value is not None:
                message = f"judge {self.judge} does not read it: leave it out"
                found.append(Problem(key, value, message, ("judge",)))
        return found + _form_problems(self)


def _form_problems(section: JudgeConfig) -> list[Problem]:
    found = []
    url, function = section.judge_base_url, section.judge_function
    if url is not None and not re.fullmatch(r"https?://[^\s@?#]+", url):
        message = "it must start with http:// or https://, without name, password, ? and #"
        found.append(Problem("judge_base_url", re.sub(r"//.*@", "//***@", url), message))
    if function is not None and not _MODULE_FUNCTION.fullmatch(function):
        message = "it must be module:function, such as my_judge:compare"
        found.append(Problem("judge_function", function, message))
    return found


@dataclass(kw_only=True)
class EvaluateConfig(ComposedConfig, EvaluatingConfig, JobsConfig, JudgeConfig):
    """Everything `preftune evaluate` needs besides what it evaluates."""

    yaml_options = YAML_OPTIONS

    def cross_problems(self) -> list[Problem]:
        """Settings that contradict each other."""
        jobs = self.eval_jobs or []
        if not jobs and self.judge is None:
            message = "give eval_jobs, or a judge: there is nothing to do"
            return [Problem("eval_jobs", self.eval_jobs, message, ("judge",))]
        if self.hub_repo_id is not None and "beaker" not in jobs:
            message = "only the job beaker reads it: leave it out"
            return [Problem("hub_repo_id", self.hub_repo_id, message, ("eval_jobs",))]
        return []
