"""Programs that have run to their end, on disk, so that none runs twice.

FOLDER/SIDE-DIGEST/call.json     what was asked; written last, so it stands for success
                   log.txt       what the program said
                   output/       what it wrote
"""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from preftune.errors import PreftuneError
from preftune.files import remove_tree, write_atomically
from preftune.launch.environment import inherited
from preftune.redaction import redacted, redacted_values

_NOTE, _LOG, _OUTPUT = "call.json", "log.txt", "output"
_LAST = 3
"""Lines of a log that an error repeats."""


class JobFailed(PreftuneError):
    """A program that evaluates did not do its work; its log says more."""


@dataclass(frozen=True)
class Call:
    """A program to run, or that has run."""

    folder: Path
    key: Mapping[str, Any]
    """What its result depends on, besides the tasks."""
    tasks: Mapping[str, str]
    """What was asked for, with a digest of its content."""

    @classmethod
    def of(cls, root: Path, side: str, key: Mapping[str, Any], tasks: Mapping[str, str]) -> "Call":
        """The call with these settings; its folder follows from them.

        Args:
            root: holds the folders of calls.
            side: base or trained.
            key: what the result depends on.
            tasks: see the field.
        """
        text = json.dumps([dict(key), dict(tasks)], sort_keys=True)
        return cls(root / f"{side}-{xxhash.xxh3_64_hexdigest(text.encode())}", key, tasks)

    @property
    def output(self) -> Path:
        """What the program writes."""
        return self.folder / _OUTPUT

    def is_finished(self) -> bool:
        """Whether it has run to its end."""
        return (self.folder / _NOTE).is_file()

    def run(self, words: Sequence[str]) -> None:
        """Run the program; what an earlier try left is removed.

        Args:
            words: of the command line.

        Raises:
            JobFailed: it could not be started, or ended with another code than 0.
        """
        remove_tree(self.folder)
        self.output.mkdir(parents=True)
        log = self.folder / _LOG
        with log.open("w", encoding="utf-8") as stream:
            stream.write(f"$ {redacted(shlex.join(words))}\n")
            stream.flush()
            # Without the variables of ranks: the program is no part of a training that is over.
            environment = inherited() | {"PYTHONUNBUFFERED": "1"}
            try:
                code = subprocess.run(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    check=False,
                ).returncode
            except OSError as error:
                raise JobFailed(f"{words[0]} cannot be started ({error})") from error
        if code:
            raise JobFailed(f"{Path(words[0]).name} ended with code {code}; {log} ends:{_end(log)}")

    def finish(self) -> None:
        """Say that its output is whole and has been read once."""
        note = {"key": dict(self.key), "tasks": dict(self.tasks)}
        text = json.dumps(redacted_values(note), indent=1, ensure_ascii=False)
        write_atomically(self.folder / _NOTE, text + "\n")


def finished(root: Path, side: str, key: Mapping[str, Any]) -> list[Call]:
    """The calls with these settings that ran to their end, the oldest first.

    Args:
        root: holds the folders of calls.
        side: base or trained.
        key: what their results depend on.
    """
    found = []
    for note in root.glob(f"{side}-*/{_NOTE}"):
        try:
            held = json.loads(note.read_text("utf-8"))
            if held["key"] == dict(key):
                call = Call(note.parent, held["key"], held["tasks"])
                found.append((note.stat().st_mtime_ns, note.parent.name, call))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: as if it had not run
    return [call for _, _, call in sorted(found, key=lambda entry: entry[:2])]


def copied(call: Call, root: Path) -> Call:
    """The same call below another folder, so that a run's folder has all that its table says."""
    target = root / call.folder.name
    if not (target / _NOTE).is_file():
        beside = root / f".{call.folder.name}.{os.getpid()}"
        remove_tree(beside)
        remove_tree(target)
        shutil.copytree(call.folder, beside)
        beside.rename(target)
    return Call(target, call.key, call.tasks)


def _end(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return "".join(f"\n  {line[:200]}" for line in lines[-_LAST:])
