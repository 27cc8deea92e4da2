"""`preftune pipeline`."""

from collections.abc import Sequence

from preftune.cli.options import wants_help
from preftune.config.pipeline import STAGES, read_pipeline
from preftune.errors import ConfigError

_HELP = f"""usage: preftune pipeline FILE.yaml

Run {", ".join(STAGES[:-1])} and {STAGES[-1]}, or some of them, in this order. Each starts from what
the one before has left. Stopped at any time, the same command goes on; a finished stage is not
repeated.

The file:

    output_dir: chain                 # a folder a stage: chain/sft, chain/dpo, ...
    model_name_or_path: BASE          # settings out here are shared by the stages that read them
    use_lora: true
    stages:
      sft:                            # options of `preftune train --stage sft`
        dataset_name: said.jsonl
        learning_rate: 2e-4
      dpo:                            # options of `preftune train`; its model is that of sft
        dataset_name: pairs.jsonl
        beta: 0.1
      merge:                          # options of `preftune merge`: adapters only
      evaluate:                       # options of `preftune score`
        dataset_name: held_out.jsonl

docs/pipeline.md says what each stage has from the one before.
"""


def run(argv: Sequence[str]) -> int:
    """Run a pipeline.

    Args:
        argv: the words after `pipeline`.
    """
    if wants_help(argv):
        print(_HELP, end="")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        given = " ".join(argv) or "nothing"
        raise ConfigError(
            f"command line: pipeline takes the path of one YAML file, not {given}; see --help"
        )
    pipeline = read_pipeline(argv[0])
    from preftune.distributed.runtime import leave_process_group
    from preftune.recipes.pipeline import run_pipeline

    run_pipeline(pipeline)
    leave_process_group()
    return 0
