"""Where the training of this process is, which no model and no dataset of BasicSR's knows alone.

`patches/` reports here, and takes from here what a training state has to say about the data.
"""

from dataclasses import dataclass, field


@dataclass
class TrainingRun:
    """A training that has made its loader.

    Args:
        seed: `manual_seed` (BasicSR's choice if not given), or that of the training which is resumed.
        items_per_iteration: indices that all processes together take from the sampler for an iteration.
        saved: iteration of the last complete checkpoint of this run.
        iteration: the last one that was begun.
        epoch_start: the last one before the current epoch, and `items_before` indices of it had been used then: those
            that the resumed training used.
        val_loaders: of the sets that are validated together.
        sets_to_validate: how many of them the state of this iteration still waits for.
        validation_is_missing: the training that is resumed ended in its validation, which has to be done first.
    """

    seed: int
    items_per_iteration: int
    saved: int = 0
    iteration: int = 0
    epoch: int = 0
    epoch_start: int = 0
    items_before: int = 0
    resumed_epoch: int = -1
    val_loaders: list = field(default_factory=list)
    sets_to_validate: int = 0
    validation_is_missing: bool = False

    def resume(self, iteration: int, epoch: int, items: int, seed: int) -> None:
        """Continue after `items` indices of this epoch."""
        self.seed, self.items_before, self.resumed_epoch = seed, items, epoch
        self.saved = self.iteration = self.epoch_start = iteration
        self.epoch = epoch

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.epoch_start = epoch, self.iteration

    def items_used_before(self, epoch: int) -> int:
        """How many indices of an epoch were used by the training that is resumed."""
        return self.items_before if epoch == self.resumed_epoch else 0

    def items_used(self, iteration: int) -> int:
        """How many indices of the current epoch have been used after an iteration of it."""
        used = (iteration - self.epoch_start) * self.items_per_iteration
        return self.items_used_before(self.epoch) + used


current: TrainingRun | None = None
