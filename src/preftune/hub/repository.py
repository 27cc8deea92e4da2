"""A repository on a hub: looked at before training, and written to in whole commits.

Where the hub is, and who asks, is huggingface_hub's own to know: HF_ENDPOINT, HF_TOKEN, `hf auth
login`. No token passes through here.
"""

import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from preftune import __version__
from preftune.config.hub import MAIN
from preftune.errors import ConfigError

MARKER = "preftune.yaml"
"""The run's settings; its first line names the run that a branch belongs to."""
_FIRST_LINE = re.compile(r"# preftune run ([0-9a-f]{16})\b")
_NEUTRAL = frozenset({".gitattributes", ".gitignore", "README.md", "LICENSE"})
"""What a hub, or its website, puts into a repository that nobody has used yet."""
_REMEDY = "look whether it is on the hub, and whether the hub can be reached"
T = TypeVar("T")


def marker(run_id: str, settings: str) -> bytes:
    """The file that tells whose a branch is.

    Args:
        run_id: of the run.
        settings: its options as YAML.
    """
    return f"# preftune run {run_id}\n{settings}".encode()


@dataclass(frozen=True)
class Repository:
    """A branch of a model repository."""

    repo_id: str
    branch: str
    private: bool
    """Whether it must not be public."""
    run_id: str | None
    """Of the run that may write there; None has not begun, so nothing there is its own."""

    @property
    def place(self) -> str:
        """For people."""
        return self.repo_id if self.branch == MAIN else f"{self.repo_id} (branch {self.branch})"

    @property
    def _api(self) -> HfApi:
        return HfApi(library_name="preftune", library_version=__version__)

    def look(self) -> None:
        """See that this user may push there, as far as that can be told without changing anything.

        Raises:
            ConfigError: no.
        """
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                "push_to_hub is true, and HF_HUB_OFFLINE is set, so nothing can be sent: unset it, "
                "or train without push_to_hub and give the same command with it where there is a "
                "network: a finished run is then pushed, and not trained again"
            )
        user = self._who()
        info = self._info()
        if info is None:
            self._check_namespace(user)
            return
        if self.private and not info.private:
            raise ConfigError(
                f"hub_repo_id is {self.repo_id!r}, which is public, and hub_private is true (as it "
                "is unless told): set hub_private false, or give another hub_repo_id"
            )
        self._check_rights(user)
        self._check_content()

    def open(self) -> None:
        """Make the repository and its branch, where they are not there.

        Raises:
            ConfigError: it cannot be made, or is another's.
        """
        user = self._who()
        if self._info() is None:
            self._asked(
                lambda: self._api.create_repo(self.repo_id, private=self.private, exist_ok=True),
                f"it is not there, and cannot be made by {user['name']}",
                f"give a token that may write there, or a repository such as {user['name']}/NAME",
            )
        self._check_rights(user)
        self._check_content()
        if self._files(self.branch) is None:
            first = self._first_commit()
            self._asked(
                lambda: self._api.create_branch(
                    self.repo_id, branch=self.branch, revision=first, exist_ok=True
                ),
                f"its branch {self.branch!r} cannot be made",
                "give another hub_revision",
            )

    def commit(
        self, files: Mapping[str, Path | bytes], message: str, instead_of: str | None = None
    ) -> str:
        """Put files there in one commit: all of them, or none.

        Large ones go ahead of the commit, and those that the hub has already are not sent again: so
        a second call goes on where the first one ended.

        Args:
            files: by their paths in the repository.
            message: of the commit.
            instead_of: a folder there, of which nothing else stays.

        Returns:
            The commit.

        Raises:
            Exception: whatever huggingface_hub raises.
        """
        changes: list[Any] = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        if instead_of is not None:
            held = self._files(self.branch) or ()
            changes += [
                CommitOperationDelete(path)
                for path in held
                if path.startswith(f"{instead_of}/") and path not in files
            ]
        made = self._api.create_commit(
            self.repo_id, changes, commit_message=message, revision=self.branch
        )
        return made.oid

    # ---------------------------------------------------------------- what the hub says

    def _who(self) -> dict[str, Any]:
        if get_token() is None:
            raise ConfigError(
                "push_to_hub is true, and there is no token: log in with `hf auth login`, or set "
                "HF_TOKEN"
            )
        try:
            return self._api.whoami()
        except Exception as error:
            if _status(error) == 401:
                raise ConfigError(
                    f"push_to_hub is true, and {constants.ENDPOINT} does not know the token: log "
                    "in anew with `hf auth login`, or set another HF_TOKEN"
                ) from error
            raise ConfigError(
                f"push_to_hub is true, and {constants.ENDPOINT} cannot be asked whose the token is "
                f"({first_line(error)}); check the network and HF_ENDPOINT, or train without "
                "push_to_hub and give the same command with it later"
            ) from error

    def _info(self) -> Any:
        try:
            return self._api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            return None
        except Exception as error:
            raise self._problem(f"it cannot be read ({first_line(error)})", _REMEDY) from error

    def _check_namespace(self, user: Mapping[str, Any]) -> None:
        """Whether a repository that is not there could be made, by what is known of the user.

        A token of fine grain does not say all that it may; making the repository tells the rest.
        """
        namespace = self.repo_id.split("/")[0]
        token = (user.get("auth") or {}).get("accessToken") or {}
        roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs") or ()}
        if token.get("role") == "read":
            raise self._problem(
                f"the token of {user['name']} may only read", "give one that may write"
            )
        if namespace != user["name"] and (
            namespace not in roles or roles[namespace] in ("read", "no_access")
        ):
            raise self._problem(
                f"it is not there, and {user['name']} may not make it for {namespace}",
                f"give a repository such as {user['name']}/{self.repo_id.split('/')[1]}",
            )

    def _check_rights(self, user: Mapping[str, Any]) -> None:
        """Ask what a push asks first, which is for those who may write alone; nothing is sent."""
        probe = [CommitOperationAdd(MARKER, b"# asks for the right to write\n")]
        self._asked(
            lambda: self._api.preupload_lfs_files(self.repo_id, probe),
            f"{user['name']} may not write there",
            f"give a token that may, or a repository such as {user['name']}/NAME",
        )

    def _check_content(self) -> None:
        files = self._files(self.branch)
        where = self.branch
        if files is None:
            where = self._first_commit()
            files = self._files(where) or ()
        foreign = sorted(set(files) - _NEUTRAL)
        if not foreign:
            return
        owner = self._owner(where) if MARKER in foreign else None
        if owner is not None and owner == self.run_id:
            return
        what = "the model of another preftune run" if owner else f"{_some(foreign)}"
        raise self._problem(
            f"{self.place} holds {what}, which would be overwritten",
            "give another hub_repo_id or hub_revision",
        )

    def _owner(self, revision: str) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            path = self._asked(
                lambda: self._api.hf_hub_download(
                    self.repo_id, MARKER, revision=revision, local_dir=folder
                ),
                f"its {MARKER} cannot be read",
                "give another hub_repo_id",
            )
            found = _FIRST_LINE.match(Path(path).read_text("utf-8", errors="replace"))
        return found.group(1) if found else None

    def _files(self, revision: str) -> Collection[str] | None:
        """Paths at a revision; None where there is no such."""
        try:
            return self._api.list_repo_files(self.repo_id, revision=revision)
        except RevisionNotFoundError:
            return None
        except Exception as error:
            raise self._problem(f"it cannot be read ({first_line(error)})", _REMEDY) from error

    def _first_commit(self) -> str:
        """Where a branch of its own begins: before the files of others."""
        commits = self._asked(
            lambda: self._api.list_repo_commits(self.repo_id), "it cannot be read", _REMEDY
        )
        return commits[-1].commit_id

    def _asked(self, ask: Callable[[], T], what: str, remedy: str) -> T:
        try:
            return ask()
        except Exception as error:
            raise self._problem(f"{what} ({first_line(error)})", remedy) from error

    def _problem(self, what: str, remedy: str) -> ConfigError:
        return ConfigError(f"hub_repo_id is {self.repo_id!r}: {what}; {remedy}")


def first_line(error: BaseException) -> str:
    """What went wrong, in a line: the hub's own words, where it has any."""
    if type(error) is RuntimeError and error.__cause__ is not None:  # huggingface_hub's wrapper
        return f"{str(error).rstrip('.')}: {first_line(error.__cause__)}"
    told = getattr(error, "server_message", None)
    lines = [line.strip() for line in (told or str(error)).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
