"""Tokenised sources shared through a private dataset repository on the Hugging Face Hub.

    <user>/preftune-tokenized: <key>/shard-00000.arrow … <key>/complete.json

The same folders as in the local cache, which they are copied to and from.
"""

import shutil
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from preftune.errors import CacheError
from preftune.files import replacing

REPOSITORY = "preftune-tokenized"


class HubCache:
    """The repository of the user who is logged in."""

    def __init__(self) -> None:
        """Find out who is logged in.

        Raises:
            CacheError: nobody is, or the Hub cannot be reached.
        """
        self._api = HfApi()
        try:
            user = self._api.whoami()["name"]
        except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
            raise CacheError(
                f"dataset_cache_mode is 'hub', and the Hub cannot be asked who you are "
                f"({_first_line(error)}); log in with `hf auth login`, or take local"
            ) from error
        self.repository = f"{user}/{REPOSITORY}"

    def fetch(self, folder: Path) -> bool:
        """Copy the folder of this name from the repository, if it has one.

        Returns:
            Whether it is there now, whole.

        Raises:
            CacheError: the Hub cannot be read.
        """
        try:
            snapshot = snapshot_download(
                self.repository, repo_type="dataset", allow_patterns=f"{folder.name}/*"
            )
        except RepositoryNotFoundError:
            return False
        except (HfHubHTTPError, OSError) as error:
            raise self._unusable("read", error) from error
        files = sorted((Path(snapshot) / folder.name).glob("*"))
        if not any(file.suffix == ".json" for file in files):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        # Shards first: the .json says that all are there.
        for file in sorted(files, key=lambda file: file.suffix == ".json"):
            with replacing(folder / file.name) as temporary:
                shutil.copyfile(file, temporary)
        return True

    def push(self, folder: Path) -> None:
        """Put a finished folder into the repository, which is made, private, if need be.

        Raises:
            CacheError: the Hub cannot be written to.
        """
        try:
            self._api.create_repo(self.repository, repo_type="dataset", private=True, exist_ok=True)
            self._api.upload_folder(
                repo_id=self.repository,
                repo_type="dataset",
                folder_path=folder,
                path_in_repo=folder.name,
                allow_patterns=["*.arrow", "*.json"],
                commit_message=f"Add {folder.name}",
            )
        except (HfHubHTTPError, OSError) as error:
            raise self._unusable("written", error) from error

    def _unusable(self, verb: str, error: Exception) -> CacheError:
        return CacheError(
            f"dataset_cache_mode is 'hub', and {self.repository} cannot be {verb} "
            f"({_first_line(error)}); check network and rights, or take local: what is tokenised "
            "stays in cache_dir"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
