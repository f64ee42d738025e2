from __future__ import annotations

import pickle

import pytest

from keepsight.streams import errors
from keepsight.streams.errors import KeepsightError

CLASSES = [value for name in errors.__all__ if isinstance(value := getattr(errors, name), type)]


def test_every_class_has_its_own_exit_code_and_kind() -> None:
    assert sorted(cls.exit_code for cls in CLASSES) == list(range(1, len(CLASSES) + 1))
    assert len({cls.kind for cls in CLASSES}) == len(CLASSES)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    for cls in CLASSES:
        line = next(line for line in (errors.__doc__ or "").splitlines() if f"{cls.__name__} " in line)
        assert line.split()[-2:] == [str(cls.exit_code), cls.kind]
        builtin = [base for base in cls.__bases__ if not issubclass(base, KeepsightError) and base is not Exception]
        assert all(f"({base.__name__})" in line for base in builtin)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_reads_as_message_and_fix(cls: type[KeepsightError]) -> None:
    assert str(cls("no such thing.")) == "no such thing."
    assert str(cls("no such thing.", fix="Make one.")) == "no such thing. Make one."


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_a_process_pool(cls: type[KeepsightError]) -> None:
    again = pickle.loads(pickle.dumps(cls("lost.", fix="Find it.")))
    assert type(again) is cls and str(again) == "lost. Find it."
