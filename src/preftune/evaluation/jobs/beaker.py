"""The evaluation as an experiment on Beaker: specified, checked by beaker-py, submitted.

Source: beaker-py 2 (https://github.com/allenai/beaker-py), `BeakerExperimentSpec`.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import yaml

from preftune.config.jobs import JobsConfig
from preftune.errors import ConfigError, absent_package
from preftune.evaluation.jobs.calls import JobFailed

if TYPE_CHECKING:
    from beaker import BeakerExperimentSpec  # pyright: ignore[reportMissingImports]

OUTPUT = "/results"
"""Where Beaker looks for what an experiment writes."""
_DOCKER = "docker:"


def check_beaker(*, submits: bool) -> None:
    """See that beaker-py is installed and, where something is submitted, who submits.

    Args:
        submits: whether credentials are needed.

    Raises:
        ConfigError: it is not, or there are none.
    """
    if find_spec("beaker") is None:
        asked, otherwise = "the job beaker is asked for", "leave it out of eval_jobs"
        raise absent_package(asked, "beaker-py", "beaker", otherwise)
    if submits:
        _settings()


def _settings() -> Any:
    from beaker.config import Config  # pyright: ignore[reportMissingImports]

    try:
        return Config.from_env()
    except Exception as error:  # its own class, or what a damaged file makes of YAML
        raise ConfigError(
            f"the job beaker needs credentials ({error}); set BEAKER_TOKEN, or log in with the "
            "beaker command (~/.beaker/config.yml)"
        ) from error


def experiment(words: Sequence[str], config: JobsConfig) -> "BeakerExperimentSpec":
    """The specification.

    Args:
        words: of `preftune evaluate`.
        config: image, cluster and so on.

    Raises:
        ConfigError: beaker-py's types refuse it.
    """
    import beaker  # pyright: ignore[reportMissingImports]

    assert config.beaker_image is not None  # the config refuses a job without one
    image = config.beaker_image
    place = "docker_image" if image.startswith(_DOCKER) else "beaker_image"
    secret = config.beaker_hf_secret
    gpus = 1 if config.beaker_gpus is None else config.beaker_gpus
    try:
        variables = [beaker.BeakerEnvVar(name="HF_TOKEN", secret=secret)] if secret else None
        spec = beaker.BeakerExperimentSpec.new(
            budget=config.beaker_budget,
            description=f"preftune evaluate {words[0]}",
            task_name="evaluate",
            cluster=config.beaker_cluster,
            result_path=OUTPUT,
            priority=config.beaker_priority or "normal",
            command=["preftune", "evaluate", *words],
            resources=beaker.BeakerTaskResources(gpu_count=gpus),
            env_vars=variables,
            **{place: image.removeprefix(_DOCKER)},
        )
        again = beaker.BeakerExperimentSpec.from_json(spec.to_json())
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"beaker-py refuses the experiment ({error})") from error
    if again != spec:
        raise ConfigError("beaker-py reads the experiment back as another one; update beaker-py")
    return spec


def as_yaml(spec: "BeakerExperimentSpec") -> str:
    """The specification as `beaker experiment create` takes it."""
    return yaml.safe_dump(spec.to_json(), sort_keys=False)


def submit(spec: "BeakerExperimentSpec", workspace: str | None) -> str:
    """Start the experiment.

    Args:
        spec: of it.
        workspace: where; None: the default one of the credentials.

    Returns:
        Its id.

    Raises:
        JobFailed: Beaker refuses it, or cannot be reached.
    """
    from beaker import Beaker  # pyright: ignore[reportMissingImports]

    _settings()
    try:
        with Beaker.from_env(check_for_upgrades=False) as client:
            place = None if workspace is None else client.workspace.get(workspace)
            return client.experiment.create(spec=spec, workspace=place).experiment.id
    except Exception as error:  # whatever the network and the client make of it
        raise JobFailed(f"Beaker did not take the experiment ({error})") from error
