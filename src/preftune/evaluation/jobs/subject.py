"""A model to evaluate, by name and by content."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from preftune.config.model import ModelConfig
from preftune.errors import ModelError
from preftune.model.adapter_files import adapter_folder, base_record, read_config
from preftune.model.load import check_model_files, model_commit

_READ = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files that what a model says may depend on."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Subject:
    """A model, with an adapter or without."""

    model: str
    """A folder, a .gguf file or a name on the Hub."""
    revision: str | None = None
    adapter: str | None = None
    """A folder, or a name on the Hub."""
    adapter_revision: str | None = None
    tokenizer: str | None = None
    """A folder; None: the model's own."""

    @classmethod
    def named(cls, name: str, revision: str | None, key: str) -> "Subject":
        """What a folder or a name stands for: a model, or an adapter over its base.

        Args:
            name: of it.
            revision: of it, on the Hub.
            key: the option or argument that named it.

        Raises:
            ModelError: nothing that can be loaded is there.
        """
        if not (Path(name).expanduser() / "adapter_config.json").is_file():
            check_model_files(name, key)
            return cls(name, revision)
        folder = adapter_folder(name, revision, key)
        files = read_config(folder, name, key)
        if not files.base_model_name_or_path:
            raise ModelError(f"{key} is {name!r}, an adapter whose files name no base; merge it")
        tokenizer = name if (folder / "tokenizer_config.json").is_file() else None
        return cls(files.base_model_name_or_path, files.revision, name, None, tokenizer)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.adapter or self.model

    @cached_property
    def digest(self) -> str:
        """xxh3_128, in hex, of its files; of a model on the Hub, of its name and commit.

        Raises:
            ModelError: it cannot be found.
        """
        digest = xxhash.xxh3_128(_digest(self.model, self.revision).encode())
        if self.adapter is not None:
            digest.update(f"|adapter|{_digest(self.adapter, self.adapter_revision)}".encode())
        if self.tokenizer is not None:
            files = sorted(Path(self.tokenizer).expanduser().glob("*"))
            _add_files(digest, [f for f in files if "token" in f.name or f.suffix == ".jinja"])
        return digest.hexdigest()

    def refuse_quantized(self) -> None:
        """See that the harness can load it as it was trained.

        Raises:
            ModelError: it is an adapter over a base that training saw in 4 or 8 bits.
        """
        if self.adapter is None:
            return
        record = base_record(self.adapter, self.adapter_revision, "adapter")
        if record.get("load_in_4bit") or record.get("load_in_8bit"):
            raise ModelError(
                f"{self.adapter} is an adapter over a quantised base, and the harness would put it "
                "over the plain one; merge it (preftune merge), and evaluate that folder"
            )

    @property
    def stored_dtype(self) -> str | None:
        """How its files have the weights, where they are a folder that says so."""
        try:
            config = json.loads((Path(self.model).expanduser() / "config.json").read_text("utf-8"))
            return config.get("dtype") or config.get("torch_dtype")
        except (OSError, ValueError, AttributeError):
            return None


def _digest(name: str, revision: str | None) -> str:
    path = Path(name).expanduser()
    digest = xxhash.xxh3_128()
    if path.is_dir():
        _add_files(digest, sorted(f for f in path.iterdir() if f.suffix in _READ))
    elif path.is_file():
        _add_files(digest, [path])
    else:
        commit = model_commit(ModelConfig(model_name_or_path=name, model_revision=revision))
        digest.update(f"{name}@{commit}".encode())
    return digest.hexdigest()


def _add_files(digest: xxhash.xxh3_128, files: list[Path]) -> None:
    for file in files:
        digest.update(f"|{file.name}|{file.stat().st_size}|".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
