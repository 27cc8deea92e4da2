"""The `preftune` command: finds the subcommand, turns errors into text and exit codes."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from preftune import __version__
from preftune.errors import ConfigError, Interrupted, PreftuneError
from preftune.launch.environment import ERROR_FILE
from preftune.redaction import redacted

COMMANDS = {
    "train": "train a policy on pairs of answers, or by supervised fine-tuning",
    "check": "check configuration and data without loading weights",
    "plan": "parameters, memory, time and disk of a run, before anything loads",
    "score": "log-probs and accuracy of models on pairs, and lists of odd pairs",
    "evaluate": "evaluation jobs and win rate: trained model against base",
    "verify-resume": "train straight, and stopped and resumed, and compare the two",
    "export": "write the weights of a checkpoint as a Hugging Face model",
    "merge": "add a LoRA adapter to its base, and write a plain model",
    "pipeline": "SFT, DPO, merge and evaluate from one file; goes on where it stopped",
    "report": "write the report of a run again, or compare runs",
    "launch": "run a command in several processes: local, hosts, slurm, skypilot, kubernetes",
    "data": "look at the pairs and tokens of a run; fill the cache of tokens",
    "cache": "reference log-probs: build, show, verify, prune, export",
    "config": "show and compare configurations; presets; the JSON Schema",
    "quickstart": "train a small model that comes with preftune, in a few minutes",
}
"""What each command does; its module here, of the same name with _ for -, has `run(argv)`."""


def entrypoint() -> None:
    """Run as the installed command."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run a command line.

    Args:
        argv: the words after `preftune`.

    Returns:
        The exit code: 0 done, 2 the input is wrong, 3 training stopped itself, 75 interrupted with
        a checkpoint saved, 1 anything else.
    """
    try:
        return _dispatch(argv)
    except PreftuneError as error:
        return _told(error)
    except OSError as error:
        # The machine's fault: a full disk, missing rights. The file is what a person needs.
        where = f" ({error.filename})" if error.filename else ""
        _tell(f"preftune: error: {error.strerror or error}{where}", error)
        return 1
    except KeyboardInterrupt as error:
        _tell("preftune: interrupted", error)
        return 1
    except Exception as error:
        if lost := _lost_peer(error):
            return _told(lost)
        # Not foreseen, so a fault of preftune's: the traceback is what a report needs.
        _tell(traceback.format_exc().rstrip("\n"), error)
        return 1


def _lost_peer(error: Exception) -> PreftuneError | None:
    """What an error says of another process that is gone, where there are others."""
    if "preftune.distributed.runtime" not in sys.modules:
        return None
    from preftune.distributed.peers import lost_peer

    return lost_peer(error)


def _told(error: PreftuneError) -> int:
    """Say what went wrong, once for all ranks; gives the exit code."""
    if not error.rank:  # None, or that of rank 0
        what = "interrupted" if isinstance(error, Interrupted) else "error"
        _tell(f"preftune: {what}: {error}", error)
    if error.rank is not None:
        # Launchers end all ranks as soon as one has ended: not before it is told.
        from preftune.distributed.runtime import leave_process_group

        leave_process_group()
    return error.exit_code


def _tell(text: str, error: BaseException) -> None:
    """Say why the command ends: on the terminal, or to the launcher, which says it once for all."""
    text = redacted(text)
    if path := os.environ.get(ERROR_FILE):
        said = json.dumps({"text": text, "kind": type(error).__name__})
        with suppress(OSError):
            Path(path).write_text(said, encoding="utf-8")
            return
    print(text, file=sys.stderr, flush=True)


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(_help())
        return 0 if argv else 2
    if argv[0] in ("--version", "-V"):
        print(f"preftune {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(COMMANDS)}"
        raise ConfigError(f"{command} is not a command; {hint}")
    # Imported only now, and each imports its heavy half in turn only once its options are right.
    return import_module(f"preftune.cli.{command.replace('-', '_')}").run(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: preftune COMMAND [CONFIG.yaml] [--key value ...]",
            "",
            "Align a language model to human preferences.",
            "",
            "commands:",
            *lines,
            "",
            "`preftune COMMAND --help` lists its options; --version shows the version.",
        ]
    )
