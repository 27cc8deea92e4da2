"""Named functions that rewrite raw rows, in order, before their format is decided.

A transform takes a row as a dict with preftune's column names and returns a row, or raises
`DropRow`. It must be pure: what it returns may depend on the row alone, since rows are read in
any process, once, and then from a cache that knows only its code.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import xxhash

from preftune.data.reasons import Dropped, DropReason
from preftune.data.transforms import builtin
from preftune.data.transforms.builtin import BUILTIN_TRANSFORMS, Transform
from preftune.errors import ConfigError, DataError

__all__ = ["BUILTIN_TRANSFORMS", "DropRow", "RowTransforms", "load_transforms"]


class DropRow(Exception):
    """Raised by a transform to drop its row on purpose: `raise DropRow("no answer")`."""


@dataclass(frozen=True)
class RowTransforms:
    """Transforms by name, applied in order; pickled as names, so worker processes can have it."""

    names: tuple[str, ...]

    def __call__(self, row_id: str, dataset: str, row: dict[str, Any]) -> dict[str, Any] | Dropped:
        """Apply all to one row.

        Args:
            row_id: where the row stands, for people.
            dataset: the dataset's name, for people.
            row: its columns under preftune's names. The dict is copied, what it holds is not.

        Returns:
            The new row, or the row's id, reason and the words of `DropRow`.

        Raises:
            DataError: a transform failed or returned no row.
        """
        row = dict(row)
        for name, function in zip(self.names, self._functions, strict=True):
            where = f"{row_id} of dataset {dataset}: transform {name!r}"
            try:
                result = function(row)
            except DropRow as why:
                detail = f"{name}: {why}" if str(why) else name
                return Dropped(row_id, DropReason.DROPPED_BY_TRANSFORM, detail)
            except Exception as error:
                raise DataError(
                    f"{where} raised {type(error).__name__}: {error}; correct the transform or the "
                    f"row, or raise preftune.DropRow to leave the row out"
                ) from error
            if not isinstance(result, dict):
                what = "nothing" if result is None else f"{type(result).__name__} {result!r:.60}"
                raise DataError(
                    f"{where} returned {what}; return the row as a dict (to leave a row out, raise "
                    f"preftune.DropRow)"
                )
            row = result
        return row

    @cached_property
    def fingerprint(self) -> str:
        """xxh3_128, in hex, of names, order and code: the files that hold the functions.

        What these files import is not followed.
        """
        digest = xxhash.xxh3_128()
        for name, function in zip(self.names, self._functions, strict=True):
            digest.update(f"{name}\n".encode())
            for file in _files_of(name, function):
                digest.update(xxhash.xxh3_128_digest(file.read_bytes()))
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the names alone; functions of the user's modules are found again by name."""
        return RowTransforms, (self.names,)

    @cached_property
    def _functions(self) -> tuple[Transform, ...]:
        return tuple(_find(name) for name in self.names)


def load_transforms(names: Sequence[str]) -> RowTransforms:
    """Find transforms by name.

    Args:
        names: of built-in transforms, or `module:function`; modules of the current folder can be
            named, as with `python -m`.

    Raises:
        ConfigError: naming every one that does not exist, cannot be imported or called.
    """
    problems: list[str] = []
    for name in names:
        try:
            _find(name)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return RowTransforms(tuple(names))


def _find(name: str) -> Transform:
    if name in BUILTIN_TRANSFORMS:
        return BUILTIN_TRANSFORMS[name]
    where = f"dataset_transforms: {name!r}"
    if ":" not in name:
        near = difflib.get_close_matches(name, BUILTIN_TRANSFORMS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"{where} is not a transform{hint}; they are {', '.join(BUILTIN_TRANSFORMS)}, and "
            f"your own as module:function"
        )
    return cast(
        Transform, import_function(name, where, "a function that takes a row and returns it")
    )


def import_function(name: str, where: str, what: str) -> Callable[..., Any]:
    """A function of the user's, by name.

    Args:
        name: module:function; modules of the current folder can be named, as with `python -m`.
        where: the option and its value, for people.
        what: what it must be, for people.

    Raises:
        ConfigError: it does not exist, or cannot be imported or called.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ConfigError(f"{where} is not written module:function, such as my_rows:clean")
    module = _import(where, module_name)
    function = getattr(module, attribute, None)
    if function is None:
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"{where}: module {module_name!r} ({module.__file__}) has no {attribute!r}{hint}; "
            f"correct the name"
        )
    if not callable(function):
        raise ConfigError(
            f"{where} is of type {type(function).__name__}, which cannot be called; name {what}"
        )
    return function


def _import(where: str, module: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    # SystemExit: a script that runs when it is imported.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{where}: module {module!r} cannot be imported ({type(error).__name__}: {error}); "
            f"correct it, or run in the folder that holds it (this is {folder})"
        ) from error


def _files_of(name: str, function: Transform) -> list[Path]:
    """The files to watch: the module that was named, and the one the function was written in."""
    if name in BUILTIN_TRANSFORMS:
        return [Path(builtin.__file__)]
    modules = [name.partition(":")[0], getattr(function, "__module__", None)]
    files = [getattr(sys.modules.get(module or ""), "__file__", None) for module in modules]
    return [Path(file) for file in dict.fromkeys(files) if file is not None]
