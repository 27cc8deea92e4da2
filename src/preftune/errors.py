"""The errors preftune raises on purpose, and the exit code each one ends the command with."""


class PreftuneError(Exception):
    """Base of all errors raised on purpose; its text says what, where and what to do."""

    exit_code = 1
    rank: int | None = None
    """This process, where every rank raises the error, which rank 0 then tells; None where it is
    raised here alone."""

    def __init__(self, problems: list[str] | str) -> None:
        """Keep the problems and join them into one message.

        Args:
            problems: one message, or one a problem, each naming key, value and remedy.
        """
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            lines = [f"- {problem}".replace("\n", "\n  ") for problem in self.problems]
            text = "\n".join([f"{len(lines)} problems:", *lines])
        super().__init__(text)


class ConfigError(PreftuneError):
    """The configuration cannot be run; holds every problem found, not only the first."""

    exit_code = 2


class DataError(PreftuneError):
    """A dataset, or a row of one, cannot be used; the text names the file and the row."""

    exit_code = 2


class ModelError(PreftuneError):
    """The model or tokenizer named by the user cannot be loaded or used."""

    exit_code = 2


class CacheError(PreftuneError):
    """The store of reference log-probs is damaged or disagrees with the model."""

    exit_code = 2


class CheckpointError(PreftuneError):
    """A checkpoint or run folder cannot be used for what was asked."""

    exit_code = 2


class TrainingDiverged(PreftuneError):
    """Training stopped itself: the loss or a gradient was not finite."""

    exit_code = 3


class Interrupted(PreftuneError):
    """A signal stopped the run after it saved a checkpoint; the same command goes on."""

    exit_code = 75


class PushFailed(PreftuneError):
    """The trained model is on disk, and not on the hub; the same command goes on pushing."""


class PeerLost(PreftuneError):
    """Another process of the run is gone or does not answer; the same command goes on."""


class Findings:
    """What parts that do not need each other find wrong, to be told all at once.

    Example:
        >>> findings = Findings()
        >>> for name in names:
        ...     with findings:  # wrong input ends this block only
        ...         sources.append(open_source(name))
        >>> findings.raise_all()
    """

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self.errors: list[PreftuneError] = []

    def __enter__(self) -> None:
        """Begin a part."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Keep what the part found wrong with the user's input, and go on after it."""
        if isinstance(error, PreftuneError) and error.exit_code == ConfigError.exit_code:
            self.errors.append(error)
            return True
        return False

    def raise_all(self) -> None:
        """Raise what was found, if anything; what two parts found is told once.

        Raises:
            PreftuneError: the error itself where there is one; else one that holds all, a
                ConfigError unless all are of one class.
        """
        if not self.errors:
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        problems = dict.fromkeys(problem for error in self.errors for problem in error.problems)
        kinds = {type(error) for error in self.errors}
        kind = kinds.pop() if len(kinds) == 1 else ConfigError
        raise kind(list(problems)) from self.errors[0]


def absent_package(asked: str, package: str, extra: str, otherwise: str) -> ConfigError:
    """The error of a package that is needed and not there.

    Args:
        asked: the setting that needs it, in words.
        package: as it is called on the index.
        extra: of preftune, that brings it.
        otherwise: what to do without.
    """
    return ConfigError(
        f"{asked}, and the package {package} is not installed; install it "
        f"(pip install 'preftune[{extra}]'), or {otherwise}"
    )
