"""Rows of numbers, one for each model, without gaps: what is asked of all models is one operation on a column.

The last row moves to where one was removed, so a row's place may change whenever a model goes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.void]

_FIRST_ROWS = 64


class Table:
    """models: their names, in the order of the rows. blank: a row as a new model gets it, of shape ()."""

    def __init__(self, blank: Rows) -> None:
        self.models: list[str] = []
        self._places: dict[str, int] = {}
        self._blank = blank
        self._room = np.empty(_FIRST_ROWS, blank.dtype)
        self.rows = self._room[:0]

    def place(self, model: str) -> int | None:
        """The number of its row; None: it has none."""
        return self._places.get(model)

    def add(self, model: str) -> int:
        """A blank row for a model that has none; its place."""
        place = len(self.models)
        if place == len(self._room):
            self._room = np.concatenate((self._room, np.empty_like(self._room)))
        self._room[place] = self._blank
        self.models.append(model)
        self._places[model] = place
        self.rows = self._room[: place + 1]
        return place

    def remove(self, model: str) -> None:
        """Raises: KeyError."""
        place = self._places.pop(model)
        last = self.models.pop()
        if last != model:
            self._room[place] = self._room[len(self.models)]
            self.models[place] = last
            self._places[last] = place
        self.rows = self._room[: len(self.models)]
