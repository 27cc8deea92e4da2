"""Where a chat template comes from: a built-in name, a file, a folder or a Hub id."""

import difflib
import json
import re
from pathlib import Path

from preftune.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# Where transformers saves a template, and where it did before; the first one found counts.
_FILES = ("chat_template.jinja", "tokenizer_config.json")


def builtin_templates() -> list[str]:
    """Names that `set_chat_template` knows by themselves."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def template_text(name: str) -> str:
    """Read the text of a chat template.

    Args:
        name: a built-in name, the path of a Jinja file, or a tokenizer whose template is taken: its
            folder or Hub id. A path that exists wins over an id. No code of the tokenizer runs.

    Raises:
        ConfigError: nothing has that name, it cannot be read, or the tokenizer has no template.
    """
    path = Path(name).expanduser()
    if name in builtin_templates():
        return _read(TEMPLATES / f"{name}.jinja")
    if path.is_file():
        return _read(path)
    if path.is_dir():
        return _of_tokenizer(name, [path / file for file in _FILES if (path / file).is_file()])
    if _HUB_ID.fullmatch(name) and not name.endswith(".jinja"):
        return _of_hub(name)
    raise ConfigError(_unknown(name))


def _unknown(name: str) -> str:
    names = builtin_templates()
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"chat_template: {name!r} is neither a built-in template nor a file or folder{hint}; "
        f"built-in names are {', '.join(names)}; otherwise give the path of a .jinja file, or the "
        "folder or Hub id (owner/name) of a tokenizer that has a template"
    )


def _of_hub(name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable: Exception | None = None
    for file in _FILES:
        try:
            return _of_tokenizer(name, [Path(hf_hub_download(name, file))])
        except LocalEntryNotFoundError as error:  # no network, and not in the Hub's cache
            unreachable = error
        except EntryNotFoundError:
            continue
        except ConfigError:
            raise
        # Rights, names, broken servers: whatever it was, the user's next step is ours to say.
        except Exception as error:
            unreachable = error
            break
    if unreachable is None:
        return _of_tokenizer(name, [])
    lines = str(unreachable).strip().splitlines() or [""]
    raise ConfigError(
        f"chat_template: {name!r} is no local file or folder, and reading it from the Hugging Face "
        f"Hub failed ({type(unreachable).__name__}: {lines[0][:300]}); check the spelling, your "
        "login and the network, or give the path of a .jinja file"
    ) from unreachable


def _of_tokenizer(name: str, files: list[Path]) -> str:
    """Take the template out of the first of a tokenizer's files."""
    if not files:
        raise ConfigError(
            f"chat_template: {name!r} has neither {' nor '.join(_FILES)}; name a tokenizer that "
            "has a chat template, or give the path of a .jinja file"
        )
    text = _read(files[0])
    if files[0].suffix == ".jinja":
        return text
    try:
        template = json.loads(text)["chat_template"]
        if isinstance(template, list):  # several named ones
            template = {each["name"]: each["template"] for each in template}["default"]
    except (ValueError, KeyError, TypeError):
        template = None
    if not isinstance(template, str):
        raise ConfigError(
            f"chat_template: the {files[0].name} of {name!r} holds no chat template; name a "
            "tokenizer that has one (an -Instruct or -it model's), or give the path of a .jinja "
            "file"
        )
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template: {path} cannot be read ({error}); check the file"
        ) from None
