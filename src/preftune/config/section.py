"""What every group of options has."""

from dataclasses import Field
from typing import Any, ClassVar

from preftune.config.problem import Problem


class Section:
    """A group of options: a keyword-only dataclass whose fields each carry a docstring.

    A section on its own resolves its defaults and reports problems when asked; a
    `ComposedConfig` made of several checks them all and refuses to exist with any.

    Merged into one class, sections share its names: a helper is a function of the section's
    module, not a method, and `super()` would reach another section, so it is not used.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        """Fill the values that follow from others. Must accept bad values: checks come after."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        return []
