"""Position of the training in this process, which no single model or dataset of BasicSR knows.

`patches/` updates it, and reads from it what a training state records about the data.
"""

from dataclasses import dataclass, field


@dataclass
class TrainingRun:
    """A training whose loader has been built.

    Args:
        seed: `manual_seed` (BasicSR's choice if not given), or that of the resumed training.
        items_per_iteration: indices that all processes together take from the sampler per iteration.
        saved: iteration of the last complete checkpoint of this run.
        iteration: the last iteration started.
        epoch_start: the last iteration before the current epoch, of which the resumed training had used
            `items_before` indices.
        val_loaders: of the sets validated together.
        sets_to_validate: number of these that the state of this iteration still waits for.
        validation_is_missing: the resumed training ended during its validation, which must be done first.
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
        """Continues after `items` indices of this epoch."""
        self.seed, self.items_before, self.resumed_epoch = seed, items, epoch
        self.saved = self.iteration = self.epoch_start = iteration
        self.epoch = epoch

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.epoch_start = epoch, self.iteration

    def items_used_before(self, epoch: int) -> int:
        """Number of indices of an epoch used by the resumed training."""
        return self.items_before if epoch == self.resumed_epoch else 0

    def items_used(self, iteration: int) -> int:
        """Number of indices of the current epoch used after an iteration."""
        used = (iteration - self.epoch_start) * self.items_per_iteration
        return self.items_used_before(self.epoch) + used


current: TrainingRun | None = None
