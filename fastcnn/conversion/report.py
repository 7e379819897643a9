"""What became of every layer of a converted model."""

from typing import NamedTuple

from fastcnn.backends import _table


class Row(NamedTuple):
    """One module: name in the model, class, what was done ("fused", "swapped", "kept"), with what or why not."""

    name: str
    cls: str
    done: str
    note: str


class Report:
    """Printed, a table with one line per module; `rows` has the same as data.

    rows: list of Row, in the order of the model's modules.
    """

    def __init__(self, rows):
        self.rows = rows

    def notes(self, *done):
        """{name: note} of the rows with one of these in `done`."""
        return {row.name: row.note for row in self.rows if row.done in done}

    @property
    def fused(self):
        """{name: with what} of the modules that run in the fused chain."""
        return self.notes("fused")

    @property
    def swapped(self):
        """{name: class} of the modules that run alone on fastcnn's ops."""
        return self.notes("swapped")

    @property
    def kept(self):
        """{name: reason} of the modules that run as before."""
        return self.notes("kept")

    def __str__(self):
        table = _table([("module", "class", "done", "with what, or why not"), *self.rows])
        counts = ", ".join(f"{len(self.notes(done))} {done}" for done in ("fused", "swapped", "kept"))
        return f"{table}\n{counts}"

    __repr__ = __str__
