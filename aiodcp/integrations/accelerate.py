"""What an `Accelerator` has prepared, as one state dict: `save_state` and `load_state`, asynchronously.

await checkpointer.save(accelerator_state(accelerator), "checkpoints/100")
await checkpointer.load(accelerator_state(accelerator), "checkpoints/100")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .random_states import random_states


def accelerator_state(accelerator: Any) -> dict[str, Any]:
    """Return all that `accelerator.save_state` would save, to be given to `save`, `load`, `restore` and so on.

    Models, optimizers, schedulers, data loaders that have a state, objects that were registered with
    `register_for_checkpointing`, the gradient scaler, and each rank's random states. The first of a kind has its name
    ("model"), others a number ("model_1").
    """
    states: dict[str, Any] = {}
    _add(states, "model", [accelerator.unwrap_model(each) for each in accelerator._models])
    _add(states, "optimizer", [each.optimizer for each in accelerator._optimizers])
    _add(states, "scheduler", accelerator._schedulers)
    _add(
        states,
        "dataloader",
        [each for each in accelerator._dataloaders if getattr(each, "use_stateful_dataloader", False)],
    )
    _add(states, "custom", accelerator._custom_objects)
    if getattr(accelerator, "scaler", None) is not None:
        states["scaler"] = accelerator.scaler
    states["rng"] = random_states()
    return states


def _add(states: dict[str, Any], name: str, objects: Sequence[Any]) -> None:
    for number, each in enumerate(objects):
        states[name if number == 0 else f"{name}_{number}"] = each
