"""From where on a curve means trouble.

`training.guards` says it while a run goes on, `verdict` afterwards: both by these numbers.
"""

LINES = 20
"""Lines of metrics that are looked back on. With `logging_steps: 10`, 200 steps."""
HALF = 5
"""Lines whose mean is taken, where one line would be noise."""
QUIET = 10
"""Lines at the end over which something must hold; and after which a warning is told again."""
FALL = 0.1
"""By how much both rewards must fall to be a fall, in units of reward (1 nat at beta 0.1)."""
FALL_RATIO = 0.5
"""Chosen's fall over rejected's: from here on most of what the loss wins is lost again."""
DISPLACED = -20.0
"""Nats of the mean chosen log-ratio. Useful runs lose a few nats of a long answer."""
ACCURATE, LEFT = 0.999, 0.01
"""Accuracy, and the part of the first loss that is left, of a run with nothing more to learn."""
STILL = 1e-3
"""Relative distance of a loss from its first value that counts as none."""
