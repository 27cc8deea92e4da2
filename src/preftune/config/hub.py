"""Where on a hub the trained model goes; nowhere unless told."""

import re
from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem
from preftune.config.section import Section

MAIN = "main"
HubStrategy = Literal["end", "checkpoint", "all_checkpoints"]
HUB_OPTIONS = ("hub_repo_id", "hub_private", "hub_revision", "hub_strategy")
"""What is read only where something is pushed."""
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_PART}/{_PART}")
_NEVER = re.compile(r"--|\.\.|\.git$")
_LONGEST = 96
_BRANCH = re.compile(r"(?!refs/)[A-Za-z0-9_](?:[A-Za-z0-9_./-]*[A-Za-z0-9_-])?")


@dataclass(kw_only=True)
class HubConfig(Section):
    """Pushing the trained model to a hub."""

    push_to_hub: bool = False
    """Push final/ when training is finished, to the Hugging Face Hub or the one that HF_ENDPOINT
    names, with the token of `hf auth login` or HF_TOKEN. Token, rights and repository are looked at
    before weights load; a push that fails is gone on with by the same command, without training."""

    hub_repo_id: str | None = None
    """The repository, user/name or organisation/name; made where it is not there. It must be empty,
    or this run's."""

    hub_private: bool | None = None
    """Whether a repository that is made is private; true refuses one that is there and public.
    Unset: true."""

    hub_revision: str | None = None
    """Branch to push to; made, without the files of others, where it is not there. Unset: main."""

    hub_strategy: HubStrategy | None = None
    """What is pushed. end: final/ alone, at the end; checkpoint: during training also the newest
    checkpoint, as last-checkpoint/; all_checkpoints: each one, as checkpoints/step-00000100/ and so
    on. Checkpoints are pushed in the background. Unset: end."""

    def __post_init__(self) -> None:
        """Fill what follows from pushing."""
        if self.push_to_hub is True:
            if self.hub_private is None:
                self.hub_private = True
            self.hub_revision = self.hub_revision or MAIN
            self.hub_strategy = self.hub_strategy or "end"

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        if not self.push_to_hub:
            message = "push_to_hub is false, so nothing reads it: leave it out, or set push_to_hub"
            return [
                Problem(key, value, f"{message} true", ("push_to_hub",))
                for key in HUB_OPTIONS
                if (value := getattr(self, key)) is not None
            ]
        repo, branch = self.hub_repo_id, self.hub_revision
        if repo is None:
            message = "push_to_hub is true, so it must name the repository: such as user/name"
            return [Problem("hub_repo_id", None, message, ("push_to_hub",))]
        found = []
        if not _REPO_ID.fullmatch(repo) or _NEVER.search(repo) or len(repo) > _LONGEST:
            message = (
                "it must be user/name or organisation/name, of letters, digits, -, _ and . (none "
                f"of - and . twice or at an end), {_LONGEST} characters at most"
            )
            found.append(Problem("hub_repo_id", repo, message))
        if branch is not None and (not _BRANCH.fullmatch(branch) or ".." in branch):
            message = "it must be the name of a branch, of letters, digits, -, _, . and /"
            found.append(Problem("hub_revision", branch, message))
        return found
