"""Event files for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog:
    """Writes every metric as a scalar."""

    def __init__(self, folder: Path, step: int) -> None:
        """Write into `folder`; what earlier files hold past `step` is trained, and shown, anew."""
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def append(self, record: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        """Write what is held back."""
        self._writer.close()
