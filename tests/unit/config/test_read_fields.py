"""An option that nothing reads is a lie: every field is read by a part outside `preftune.config`.

Told from the source. Outside, a read is an attribute of something that is a configuration: a
parameter, attribute or variable annotated with (or made by) a class of `preftune.config`. What a
property or method of a section reads counts where that is used outside.
"""

import ast
import inspect
import pkgutil
import textwrap
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import preftune
import preftune.config
from preftune.config.cache import (
    CacheExportConfig,
    CachePruneConfig,
    CacheShowConfig,
    CacheVerifyConfig,
)
from preftune.config.composed import ComposedConfig, sections
from preftune.config.evaluate import EvaluateConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.export import ExportConfig
from preftune.config.inspection import InspectConfig
from preftune.config.launch import (
    LaunchHostsConfig,
    LaunchKubernetesConfig,
    LaunchLocalConfig,
    LaunchSkypilotConfig,
    LaunchSlurmConfig,
)
from preftune.config.merge import MergeConfig
from preftune.config.planning import PlanConfig
from preftune.config.quickstart import QuickstartConfig
from preftune.config.report import ReportConfig
from preftune.config.score import ScoreConfig
from preftune.config.section import Section
from preftune.config.verifying import VerifyResumeConfig
from preftune.losses.knobs import KNOBS

ROOT = Path(preftune.__file__).parent
CONFIGS = {
    "train": ExperimentConfig,
    "plan": PlanConfig,
    "score": ScoreConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "data inspect": InspectConfig,
    "quickstart": QuickstartConfig,
    "verify-resume": VerifyResumeConfig,
    "merge": MergeConfig,
    "cache show": CacheShowConfig,
    "cache prune": CachePruneConfig,
    "cache export": CacheExportConfig,
    "cache verify": CacheVerifyConfig,
    "launch local": LaunchLocalConfig,
    "launch hosts": LaunchHostsConfig,
    "launch slurm": LaunchSlurmConfig,
    "launch kubernetes": LaunchKubernetesConfig,
    "launch skypilot": LaunchSkypilotConfig,
}
CHECKS = {"__post_init__", "problems", "resolve", "cross_problems"}
CLASSES = {
    name
    for module in pkgutil.iter_modules(preftune.config.__path__, "preftune.config.")
    for name, value in vars(import_module(module.name)).items()
    if isinstance(value, type) and issubclass(value, Section | ComposedConfig)
}


MAKERS = {"options_or_help", "parse_config"}


def named(annotation, classes):
    """The class of `classes` that an annotation or a call names, if any."""
    found = (n.id for n in ast.walk(annotation or ast.Pass()) if isinstance(n, ast.Name))
    return next((name for name in found if name in classes), None)


def parameters(function):
    arguments = function.args
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


def holders(trees):
    """Class outside `preftune.config` -> its attributes that hold a configuration."""
    held = {}
    for definition in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        attributes = held.setdefault(definition.name, set())
        for node in ast.walk(definition):
            if isinstance(node, ast.AnnAssign) and named(node.annotation, CLASSES):
                attributes.add(getattr(node.target, "id", None) or node.target.attr)
            if isinstance(node, ast.FunctionDef):
                given = {p.arg for p in parameters(node) if named(p.annotation, CLASSES)}
                attributes |= {
                    target.attr
                    for target, value in assignments(node)
                    if isinstance(target, ast.Attribute)
                    and isinstance(value, ast.Name)
                    and value.id in given
                }
    return {name: attributes for name, attributes in held.items() if attributes}


def assignments(function):
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from zip(target.elts, value.elts, strict=True)
            else:
                yield target, value


class Scope:
    """What the names inside a function stand for."""

    def __init__(self, function, own_class, held):
        self.held = held
        self.configs, self.holders = set(), {"self": own_class}
        for parameter in (p for f in ast.walk(function) if is_function(f) for p in parameters(f)):
            if named(parameter.annotation, CLASSES):
                self.configs.add(parameter.arg)
            elif holder := named(parameter.annotation, held):
                self.holders[parameter.arg] = holder
        for target, value in [*assignments(function)] * 2:  # one may follow from a later one
            if isinstance(target, ast.Name) and (self.is_config(value) or self.makes_one(value)):
                self.configs.add(target.id)

    def is_config(self, node):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return node.attr in self.held.get(self.holders.get(node.value.id), ())
        return isinstance(node, ast.Name) and node.id in self.configs

    def makes_one(self, node):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            return False
        copies = node.func.id == "replace" and self.is_config(node.args[0])
        return copies or node.func.id in CLASSES | MAKERS


def is_function(node):
    return isinstance(node, ast.FunctionDef)


def functions(tree):
    """Outermost functions with the name of their class."""
    for node in tree.body:
        if is_function(node):
            yield node, None
        if isinstance(node, ast.ClassDef):
            yield from ((member, node.name) for member in node.body if is_function(member))


@cache
def reads_outside(files):
    """Attributes of configurations that the rest of preftune reads."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    held = holders(trees)
    found = set()
    for function, own_class in (pair for tree in trees for pair in functions(tree)):
        scope = Scope(function, own_class, held)
        found |= {
            node.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and scope.is_config(node.value)
        }
    return found


def reads_of_members(config):
    """Property or method of a section -> the attributes of the section that it reads."""
    reads = {}
    for parent in {parent for section in (*sections(config), config) for parent in section.__mro__}:
        if not issubclass(parent, Section) or parent is Section:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for member in body:
            if isinstance(member, ast.FunctionDef) and member.name not in CHECKS:
                reads[member.name] = {
                    node.attr
                    for node in ast.walk(member)
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
                }
    # The knobs of a loss are read by name: the table of losses says which.
    reads["knobs_of"] = set(KNOBS)
    return reads


@cache
def all_reads(config, files):
    found = set(reads_outside(files))
    members = reads_of_members(config)
    while more := set().union(*(members[name] for name in found & members.keys())) - found:
        found |= more
    return found


SOURCES = tuple(file for file in ROOT.rglob("*.py") if ROOT / "config" not in file.parents)


@pytest.mark.parametrize("name", ExperimentConfig.__dataclass_fields__)
def test_every_field_is_read_somewhere(name):
    assert name in all_reads(ExperimentConfig, SOURCES), f"nothing reads {name}"


@pytest.mark.parametrize("command", list(CONFIGS)[1:])
def test_every_field_of_the_other_commands_is_read_somewhere(command):
    config = CONFIGS[command]
    assert config.__dataclass_fields__.keys() <= all_reads(config, SOURCES)


def test_a_read_counts_only_on_a_configuration(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from dataclasses import replace\n"
        "class Run:\n"
        "    def __init__(self, config: TrainingConfig):\n"
        "        self.config = config\n"
        "    def go(self, model):\n"
        "        model.config.use_cache = model.config.dtype\n"
        "        again = replace(self.config, seed=1)\n"
        "        return self.config.shuffle, again.optimizer, model.stage\n"
        "def step(config: ModelConfig | None, display):\n"
        "    display.stage()\n"
        "    config.chat_template = 'x'\n"
        "    return config.attn_implementation\n"
        "def loop(run: Run):\n"
        "    a, settings = run.x, run.config\n"
        "    return settings.weight_decay\n",
        encoding="utf-8",
    )
    read = {"shuffle", "optimizer", "attn_implementation", "weight_decay"}
    assert reads_outside((file,)) == read


def test_what_a_property_reads_counts_where_the_property_is_read(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def f(c: PairsConfig):\n    return c.eval_sources\n", encoding="utf-8")
    assert "eval_dataset" in all_reads(ExperimentConfig, (file,))
    assert "dataset_mixer" not in all_reads(ExperimentConfig, (file,))
