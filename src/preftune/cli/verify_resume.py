"""`preftune verify-resume`."""

from collections.abc import Sequence

from preftune.cli.options import options_or_help
from preftune.config.verifying import VerifyResumeConfig

USAGE = "preftune verify-resume [CONFIG.yaml] [--key value ...]"
WHAT = (
    "Train the first steps of a run twice, straight, and stopped and resumed, and compare order of "
    "data, metrics, weights and optimizer bit for bit. Writes to OUTPUT_DIR.verify-resume, which "
    "is deleted when both are the same; the run itself is not touched."
)


def run(argv: Sequence[str]) -> int:
    """Verify.

    Args:
        argv: the words after `verify-resume`.
    """
    config = options_or_help(VerifyResumeConfig, argv, USAGE, WHAT, for_ranks=True)
    if config is not None:
        from preftune.distributed.runtime import leave_process_group
        from preftune.recipes.verify_resume import verify_resume

        print(verify_resume(config))
        leave_process_group()
    return 0
