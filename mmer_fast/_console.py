"""Printing names of labels, modalities and files as they are, whole."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def plain_console(*, quiet: bool = False) -> Console:
    """A console for text in which brackets and colons are no markup: a label may be called ``[/b]``."""
    return Console(quiet=quiet, markup=False, emoji=False, highlight=False)


def print_table(console: Console, table: Table) -> None:
    """Print a table that cuts no word or number; where these do not fit it is wider than the console."""
    unbounded = console.options.update(max_width=10_000)
    for column in table.columns:
        sizes = [console.measure(text, options=unbounded) for text in (column.header, *column.cells)]
        column.min_width = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
    console.print(table, crop=False)
