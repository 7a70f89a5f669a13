import inspect
import pickle

import pytest

from aiodcp import errors
from aiodcp.errors import CheckpointError, MismatchError

EXAMPLES: list[tuple[CheckpointError, str]] = [
    (errors.CheckpointError("reason"), "reason"),
    (errors.ArgumentError("on_busy", "is wrong"), "on_busy: is wrong"),
    (errors.ClosedError("closed"), "closed"),
    (errors.DeadlockError("a deadlock"), "a deadlock"),
    (errors.BusyError("ckpt/1"), "a save to 'ckpt/1' is in flight"),
    (errors.SaveError("reason"), "reason"),
    (errors.CaptureError("model.w", "is meta"), "model.w: is meta"),
    (errors.CaptureError("", "is no mapping"), "is no mapping"),
    (errors.StageError(12, "no memory"), "cannot stage 12 bytes: no memory"),
    (
        errors.TornSnapshotError([f"w{number}" for number in range(7)]),
        "changed before they were staged: w0, w1, w2, w3, w4 and 2 more; wait for `staged` before changing tensors, "
        "or guard()",
    ),
    (errors.ParticipantError("replay", "was cancelled"), "participant 'replay' was cancelled"),
    (errors.WriteError("a/b", "No space left"), "cannot write a/b: No space left"),
    (errors.SaveCancelled("ckpt/1"), "the save to 'ckpt/1' was cancelled"),
    (
        errors.RankError(
            "write", [errors.RankFailure(rank=1, kind="OSError", text="full", traceback="Trace\n")], [2, 3]
        ),
        "write: missing: rank 2, rank 3 (died, left, or timed out); rank 1: OSError: full\n--- rank 1\nTrace",
    ),
    (errors.LoadError("reason"), "reason"),
    (errors.NotACheckpointError("ckpt/1"), "no committed checkpoint at 'ckpt/1': there is no .metadata"),
    (errors.ReadError("a/b", "Permission denied"), "cannot read a/b: Permission denied"),
    (errors.CorruptError("a/b", "model.w", "CRC"), "a/b (model.w): CRC"),
    (errors.CorruptError("a/b", "", "short"), "a/b: short"),
    (errors.UnsafeError("a/b", "model.w", "names os.system"), "a/b (model.w): names os.system"),
    (
        errors.MismatchError("ckpt/1", ["a"], ["b"], ["c has shape (1,)"]),
        "the checkpoint at 'ckpt/1' does not match the state dict\nmissing from the checkpoint (1):\n  a\n"
        "not in the state dict (1):\n  b\nincompatible (1):\n  c has shape (1,)",
    ),
    (
        errors.MismatchError("ckpt/1", ["a.wieght"], suggestions={"a.wieght": "a.weight"}, hint="try this"),
        "the checkpoint at 'ckpt/1' does not match the state dict\nmissing from the checkpoint (1):\n"
        "  a.wieght (did you mean a.weight?)\ntry this",
    ),
    (errors.FormatError("a/b", "is safetensors"), "a/b: is safetensors"),
    (
        errors.StatefulError("app", "load_state_dict() of App raised KeyError('x')"),
        "app: load_state_dict() of App raised KeyError('x')",
    ),
    (
        errors.DisagreementError([f"w{n}" for n in range(7)]),
        "the ranks hold different values of w0, w1, w2, w3, w4 and 2 more: wrap what is each rank's own in "
        "aiodcp.PerRank",
    ),
]


@pytest.mark.parametrize(("error", "text"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_error_shows_its_facts_and_survives_pickling(error: CheckpointError, text: str) -> None:
    assert str(error) == text
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == text
    assert vars(copy) == vars(error)


def test_every_error_of_the_module_has_an_example_and_is_in_the_tree_drawn_on_top() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == errors.__name__
    }
    assert classes == {type(error) for error, _ in EXAMPLES}
    assert all(issubclass(each, CheckpointError) for each in classes)
    assert errors.__doc__ is not None
    assert all(each.__name__ in errors.__doc__ for each in classes)


def test_a_mismatch_of_thousands_of_names_stays_readable() -> None:
    text = str(MismatchError("c", [f"n{number}" for number in range(5000)]))
    assert "missing from the checkpoint (5000):\n  n0\n  n1\n" in text
    assert "\n  and 4990 more" in text
    assert len(text) < 300
