"""When a fit validates for the last time."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def is_last_validation(trainer: Trainer) -> bool:
    """Return whether the fit ends before it would validate again; to be asked in a validation.

    Follows from ``max_steps``, ``max_epochs`` and the rhythm of validations, or from a stop that was asked for already.
    What ends a run otherwise, as early stopping or ``max_time`` do, isn't foreseen.
    """
    size, every = trainer.num_training_batches, trainer.check_val_every_n_epoch
    interval = trainer.val_check_batch or 1  # none where the clock says when: after any batch, then
    done = trainer.fit_loop.batch_idx + 1
    # The next validation: so many epochs further on, after so many batches of that one.
    epochs: float
    if every is None:
        until = interval - (trainer.fit_loop.total_batch_idx + 1) % interval
        epochs, batches = divmod(done + until - 1, size)
        batches += 1
    else:
        epochs, batches = 0, done + interval - done % interval
        if batches > size or math.isinf(interval):
            epochs, batches = every, min(interval, size)
    whole = 0 if math.isinf(size) else math.ceil(size / trainer.accumulate_grad_batches)

    def steps(num: float) -> float:
        return whole if num >= size else num // trainer.accumulate_grad_batches

    # It takes place if its last batch is trained on, so what counts is what precedes that batch.
    before = trainer.global_step + epochs * whole + steps(batches - 1) - steps(done)
    limits = ((before, trainer.max_steps), (trainer.current_epoch + epochs, trainer.max_epochs or 0))
    return trainer.should_stop or any(limit != -1 and reached >= limit for reached, limit in limits)
