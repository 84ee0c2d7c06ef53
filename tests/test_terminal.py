"""What a server says is shown as it is."""

import io

import pytest
from rich.table import Table

from loadgen.terminal import plain_console


@pytest.mark.parametrize("said", ["ERROR [app.py] gone", "closes nothing: [/x]", ":smile:"])
def test_no_text_is_taken_for_markup(said: str) -> None:
    console = plain_console(80)
    console.file = io.StringIO()
    table = Table("head")
    table.add_row(said)
    console.print(said)
    console.print(table)
    assert console.file.getvalue().count(said) == 2
