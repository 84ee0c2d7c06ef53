"""What a server says is shown as it is, and what the running leg's line says is known."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from loadgen import scenario
from loadgen.supervise import Progress
from loadgen.terminal import plain_console
from loadgen.view import View
from tests import synthetic


@pytest.mark.parametrize("said", ["ERROR [app.py] gone", "closes nothing: [/x]", ":smile:"])
def test_no_text_is_taken_for_markup(said: str) -> None:
    console = plain_console(80)
    console.file = io.StringIO()
    table = Table("head")
    table.add_row(said)
    console.print(said)
    console.print(table)
    assert console.file.getvalue().count(said) == 2


@pytest.mark.parametrize(("name", "says"), [
    ("chat", "12/15 good"),  # nothing is checked: within the limits is good
    ("dialogue", "12/15 good"),  # checked, but that does not count
    ("json-forced", "12/15 in time, not yet checked")])
def test_a_running_leg_calls_no_answer_good_that_is_still_to_be_checked(name: str,
                                                                        says: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    view = View(console, None, scenario.load(name).judges_answers)
    view.progress(Progress(synthetic.leg(8, "run", 40.0), 5.0, inflight=8, done=20, sampled=15,
                           good=12))
    with console.capture() as shown:
        console.print(view._render())
    assert says in shown.get()
