"""How long a training is."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.schema.training import Training


@dataclass(frozen=True)
class Length:
    """Steps, epochs and batches. A step takes `accumulation` batches, across epochs' borders.

    Steps and epochs count from 1, batches from 0 over all epochs.
    """

    batches_per_epoch: int
    accumulation: int
    epochs: int
    total_steps: int

    @classmethod
    def of(cls, batches_per_epoch: int, training: Training) -> Length:
        """Steps if they are set, else the limit of epochs, else the epochs (0 and None: not set)."""
        accumulation = training.accumulation
        if training.max_steps:
            total = training.max_steps
            return cls(batches_per_epoch, accumulation, -(-total * accumulation // batches_per_epoch), total)
        epochs = training.max_epochs or training.epochs
        return cls(batches_per_epoch, accumulation, epochs, -(-batches_per_epoch * epochs // accumulation))

    @property
    def total_batches(self) -> int:
        """All batches of the run; the last step takes fewer than the others if they don't divide."""
        return min(self.total_steps * self.accumulation, self.epochs * self.batches_per_epoch)

    def batches_of(self, step: int) -> range:
        """The batches that a step takes."""
        return range((step - 1) * self.accumulation, min(step * self.accumulation, self.total_batches))

    def epoch_of(self, step: int) -> int:
        """The epoch that a step's last batch is in."""
        return self.batches_of(step)[-1] // self.batches_per_epoch + 1

    def epochs_done(self, step: int) -> int:
        """How many epochs are complete after a step; an epoch ends where this grows."""
        return min(step * self.accumulation, self.total_batches) // self.batches_per_epoch
