"""What the labels of a data set mean: classes with names, or figures to regress on."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorica.data.words import excerpt
from lorica.text import nearest

MOST = 100_000  # class numbers beyond it are taken for figures unless they come again
FEW = 20  # distinct whole numbers written with a point that are taken for classes


@dataclass(frozen=True)
class Labels:
    """The classes of a data set (`names`, by class number), or regression (no names).

    Hand the training set's to the evaluation set, or an existing model's to both, and every label
    outside of them is an error.

    Example:
        >>> labels = Labels.of(["bad", "good", "bad"], ["row 0", "row 1", "row 2"])
        >>> labels.names, labels.number("good", "row 1"), labels.problem_type
        (('bad', 'good'), 1, 'single_label_classification')
    """

    names: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        return not self.names

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: one a class, one for regression."""
        return len(self.names) or 1

    @property
    def problem_type(self) -> str:
        """The value of the field of that name in a transformers configuration."""
        return "regression" if self.regression else "single_label_classification"

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names)) or {0: "value"}

    @property
    def label2id(self) -> dict[str, int]:
        return {name: number for number, name in self.id2label.items()}

    @classmethod
    def from_label2id(cls, label2id: Mapping[str, int]) -> Labels:
        """The classes of an existing model, from its configuration's `label2id`."""
        names = tuple(sorted(label2id, key=label2id.__getitem__))
        if [label2id[name] for name in names] != list(range(len(names))):
            raise ValueError(
                f"`label2id` is {dict(label2id)}: the classes must be numbered 0 to "
                f"{len(names) - 1}, each number once. Number them so."
            )
        return cls(names)

    @classmethod
    def from_num_labels(cls, num_labels: int) -> Labels:
        """Classes that have only numbers, 0 to `num_labels - 1`."""
        if num_labels < 2:
            raise ValueError(
                f"`num_labels` is {num_labels}: classes are at least 2. For regression pass "
                "`Labels()`."
            )
        return cls(tuple(map(str, range(num_labels))))

    @classmethod
    def of(cls, values: Sequence[Any], places: Sequence[str]) -> Labels:
        """What these labels are, by their values; a file's types don't matter.

        Whole numbers are classes named by them, in numeric order, also as texts (the way csv files
        have them). Where they begin at 0 and at least half of them occur, those that don't are
        classes too. Written with a point (`1.0`, which pandas writes once a label is missing) they
        are classes where there are at most `FEW` of them. Other numbers are a regression; booleans
        are two classes; other texts are class names in sorted order, without white space around
        them.

        Raises:
            ValueError: for an absent, nested or negative label, for one class only. The place is
                named.
        """
        for value, place in zip(values, places, strict=True):
            _check_type(value, place)
        if _are_figures(values):
            return cls()
        for value, place in zip(values, places, strict=True):
            _check_class(value, place)
        if all(isinstance(value, bool) for value in values):
            return cls(("false", "true"))
        distinct = {_name(value) for value in values}
        digits = all(map(_is_whole, distinct))
        most = max(map(int, distinct)) if digits else 0
        if digits and most >= MOST and len(distinct) > len(values) // 2:
            place = places[[_name(value) for value in values].index(str(most))]
            raise ValueError(
                f"{place}: the label is {most}, and whole numbers are classes: {len(values)} rows "
                f"can't teach {len(distinct)}. Number the classes from 0, write their names, or, "
                "for a regression, write figures with a point."
            )
        if "0" in distinct and digits and 2 * len(distinct) > most:
            distinct |= set(map(str, range(most)))  # class numbers, of which some don't occur here
        names = tuple(sorted(distinct, key=lambda v: (int(v), v)) if digits else sorted(distinct))
        if len(names) < 2:
            raise ValueError(
                f"{places[0]} and every other row has the label {excerpt(values[0])}: at least two "
                "classes are needed. Add rows of another class, or pass the model's classes."
            )
        return cls(names)

    def alike(self) -> list[tuple[str, ...]]:
        """Groups of classes whose names differ only in case, punctuation or white space.

        Example:
            >>> Labels(("No", "Yes", "no", "yes!")).alike()
            [('No', 'no'), ('Yes', 'yes!')]
        """
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(_folded(name), []).append(name)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    def __str__(self) -> str:
        if self.regression:
            return "figures (a regression)"
        return f"{len(self.names)} classes ({_shown(self.names)})"

    def renumbered(self, value: Any, own: Sequence[str], place: str) -> Any:
        """A label of a data set whose class numbers have the names `own`, as the number of that
        name among these classes; anything but such a number as it is.

        Names are compared without case. Classes that are only numbers (or `LABEL_0`, ...) on either
        side say nothing of an order: there numbers are taken as they are.

        Raises:
            ValueError: none of these classes has the label's name.

        Example:
            >>> Labels(("No", "Yes")).renumbered(0, ["yes", "no"], "row 0")
            1
        """
        if self.regression or type(value) is not int or not 0 <= value < len(own):
            return value
        mine, theirs = ([name.casefold() for name in names] for names in (self.names, own))
        if len(set(mine)) < len(mine) or len(set(theirs)) < len(theirs):
            mine, theirs = list(self.names), list(own)  # some differ by case only
        if set(mine) != set(theirs) and (_unnamed(self.names) or _unnamed(own)):
            return value
        if theirs[value] not in mine:
            raise ValueError(
                f"{place}: the label {value} is {excerpt(own[value])} by the data's own names, and "
                f"the classes are {_shown(self.names)}. Give the data's classes these names, or "
                f"leave such rows out.{nearest(own[value], self.names)}"
            )
        return mine.index(theirs[value])

    def number(self, value: Any, place: str) -> int | float:
        """The class number, or the figure, of one label.

        Raises:
            ValueError: if the label isn't one of these classes, with its place.
        """
        _check_type(value, place)
        if self.regression:
            try:
                figure = float(value)
            except ValueError:
                figure = math.nan
            if not math.isfinite(figure):
                raise ValueError(
                    f"{place}: the label {excerpt(value)} is no number, and this is a regression: "
                    "labels must be finite numbers. Mend that row."
                )
            return figure
        _check_class(value, place)
        name = _name(value)
        for known in (value, name):
            if isinstance(known, str) and known in self.names:
                return self.names.index(known)
        number = int(value) if isinstance(value, bool) else None
        # Among classes that are named by numbers a number is a name, and else the class's number.
        if _is_whole(name) and not any(map(_is_whole, self.names)):
            number = int(name)
        if number is None or not 0 <= number < len(self.names):
            raise ValueError(
                f"{place}: the label {excerpt(value)} is outside of the {len(self.names)} classes "
                f"({_shown(self.names)}; or 0 to {len(self.names) - 1}). Mend that row, or train "
                f"on data that has this class.{nearest(str(value), self.names)}"
            )
        return number


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _unnamed(names: Sequence[str]) -> bool:
    """Classes that have only numbers, as transformers names them by default."""
    return all(_is_whole(name.removeprefix("LABEL_")) for name in names)


def _check_type(value: Any, place: str) -> None:
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"{place}: the label is {excerpt(value)}: it must be a text, an integer, a boolean or "
            "a float. Mend or remove that row."
        )


def _check_class(value: Any, place: str) -> None:
    fractional = isinstance(value, float) and not value.is_integer()  # nan and infinity too
    if fractional or str(value).strip() in ("", "-1", "-1.0"):
        raise ValueError(
            f"{place}: the label is {excerpt(value)}, which is no class (-1 is how test sets mark "
            "rows without one): a name or a number from 0 is wanted. Use labelled rows."
        )
    if isinstance(value, int | float) and value < 0:
        raise ValueError(
            f"{place}: the label is {value}: class numbers start at 0. Renumber the classes, or "
            "write their names."
        )


def _name(value: Any) -> str:
    """The class's name: 1, 1.0, `1` and `1.0` are one class, and white space around it is none."""
    text = str(value).strip()
    whole, point, rest = text.partition(".")
    return whole if point and _is_whole(whole) and not rest.strip("0") else text


def _folded(name: str) -> str:
    """What near-equal names have in common."""
    plain = unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ")
    return " ".join(plain.split()).strip(".,;:!?\"' ") or name


def _is_whole(text: str) -> bool:
    """Digits that make a number of 64 bits: longer ones are a name."""
    return text.strip().isdecimal() and len(text.strip()) < 19


def _are_figures(values: Sequence[Any]) -> bool:
    """Finite numbers, also as texts, that are no classes: with a fraction, or many and written with
    a point, or negative and written so."""
    if any(isinstance(value, bool) for value in values):
        return False
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    if not all(map(math.isfinite, numbers)):
        return False
    if not all(map(float.is_integer, numbers)):
        return True
    pointed = all(isinstance(v, float) or (isinstance(v, str) and "." in v) for v in values)
    return pointed and (len(set(numbers)) > FEW or min(numbers) < 0)
