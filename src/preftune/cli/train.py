"""`preftune train`."""

from collections.abc import Sequence

from preftune.cli.options import options_or_help
from preftune.config.experiment import ExperimentConfig

USAGE = "preftune train [CONFIG.yaml] [--key value ...]"
WHAT = (
    "Train a policy: on pairs of chosen and rejected answers (--stage dpo, the default), or on "
    "what an assistant said (--stage sft). Options are the same in the file and on the command "
    "line, which wins. Stopped at any time, the same command goes on."
)


def run(argv: Sequence[str]) -> int:
    """Train.

    Args:
        argv: the words after `train`.
    """
    config = options_or_help(ExperimentConfig, argv, USAGE, WHAT, for_ranks=True)
    if config is not None:
        from preftune.distributed.runtime import is_main_process, leave_process_group
        from preftune.recipes.pairs import prepare_data
        from preftune.recipes.train import train

        if config.cache_dataset_only:
            print(prepare_data(config))
        else:
            result = train(config)
            is_main = is_main_process()
            leave_process_group()
            if config.eval_jobs and is_main:  # the others need not wait for it
                from preftune.recipes.evaluate import evaluate_trained

                evaluate_trained(config, result.folder)
    return 0
