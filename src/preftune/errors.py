"""The errors preftune raises on purpose, and the exit code each one ends the command with."""


class PreftuneError(Exception):
    """Base of all errors raised on purpose; its text says what, where and what to do."""

    exit_code = 1


class ConfigError(PreftuneError):
    """The configuration cannot be run; holds every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: list[str] | str) -> None:
        """Keep the problems and join them into one message.

        Args:
            problems: one message, or one a problem, each naming key, value and remedy.
        """
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems:\n" + "\n".join(f"- {p}" for p in self.problems)
        super().__init__(text)


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
