"""What `sweep` and `run` have in common: from the options to a session, and from what it measured
to the verdict on the terminal and the exit code. What takes long to load is imported where it is
used: a mistyped option is said at once."""

import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from loadgen import datasets, scenario
from loadgen.errors import INTERRUPTED, StoreError
from loadgen.options import (
    LENT,
    WORDS,
    asked_for,
    headers_of,
    hidden_in,
    launches,
    processes_of,
    server_of,
    slo_of,
)
from loadgen.scenario import Scenario, Slo


def measure(name: str, server_options: Sequence[str], options: dict[str, Any], do: Any,
             budget_s: float | None, most: tuple[float, str]) -> None:
    """Everything that sweep and run have in common, to the exit code. `most`: the largest load,
    and its axis."""
    from loadgen import calibration  # noqa: PLC0415
    from loadgen.judge import Criteria  # noqa: PLC0415
    from loadgen.runner import Session  # noqa: PLC0415
    from loadgen.terminal import plain_console  # noqa: PLC0415
    from loadgen.view import View  # noqa: PLC0415

    chosen = scenario.load(name).with_lengths(options["prompt_tokens"], options["output_tokens"])
    if slo := slo_of(options["slos"]):
        chosen = chosen.with_slo(slo)
    console, found = plain_console(), calibration.load()
    for words in datasets.says(c.dataset for c in chosen.classes):
        console.print(words, style="dim", highlight=False, soft_wrap=True)
    if found.ignored:
        console.print(f"Not used: {found.ignored}", style="dim", highlight=False, soft_wrap=True)
    out: Path = options["out"] or Path("runs") / run_name(chosen)
    seed = options["seed"] if options["seed"] is not None else secrets.randbelow(2**31)
    session = Session(
        scenario=chosen, out=out, server=click.get_current_context().meta[LENT] or server_of(
            options, server_options, out),
        criteria=Criteria(target=options["target"], calibration=found.calibration), seed=seed,
        model=None if launches(options) else options["model"],
        headers=headers_of(options), processes=processes_of(
            options["processes"], *most, options["base_url"]),
        command=click.get_current_context().meta[WORDS], patience_s=options["start_timeout"],
        gpus=options["gpus"], metrics_at=options["metrics_port"])
    result = do(session, View(console, budget_s, chosen.judges_answers))
    code = conclude(out, None, options["report"], result)
    raise SystemExit(code)


SECRETS = ("api_key", "headers", "proxy")  # what a manifest does not hold
OF_RESUME = {"resume", "report", "metrics_port", *SECRETS}


def go_on(folder: Path, server_options: Sequence[str], given: dict[str, Any]) -> None:
    """A search that was stopped, to its exit code."""
    from loadgen import resume, runner  # noqa: PLC0415
    from loadgen.terminal import plain_console  # noqa: PLC0415
    from loadgen.view import View  # noqa: PLC0415

    context = click.get_current_context()
    others = [p.opts[0] for p in context.command.params if p.name not in OF_RESUME
              and context.get_parameter_source(p.name or "") is ParameterSource.COMMANDLINE]
    if others:
        raise click.UsageError(f"--resume goes on with what the folder says: leave out "
                               f"{', '.join(others)}")
    before = resume.stopped(folder)
    group = context.find_root().command
    assert isinstance(group, click.Group)
    asked, own = asked_for(group, before.manifest.command[1:])
    options = {**asked, **{k: given[k] for k in SECRETS if given[k]}}
    hidden = hidden_in({k: options[k] for k in SECRETS}, server_options or own)
    if hidden:
        raise click.UsageError(f"{folder} holds no secrets: give {hidden} again")
    criteria = before.plan.criteria
    session = runner.Session(
        scenario=scenario.parse(before.manifest.scenario, where=f"{folder}/manifest.json"),
        server=server_of(options, server_options or own, folder), out=folder, criteria=criteria,
        seed=before.manifest.seed,
        model=None if launches(options) else options["model"] or before.manifest.model,
        headers=headers_of(options), processes=before.manifest.processes,
        command=before.manifest.command[1:], patience_s=options["start_timeout"],
        gpus=options["gpus"], metrics_at=given["metrics_port"])
    view = View(plain_console(), before.plan.budget_s, session.scenario.judges_answers)
    result = runner.run_sweep(session, before.plan, view, options["unit_step"], before)
    raise SystemExit(conclude(folder, None, given["report"], result))


def run_name(chosen: Scenario) -> str:
    return f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{chosen.name}"


def conclude(folder: Path, slo: Slo | None, html: bool, result: Any = None) -> int:
    """Writes summary and report, says the verdict, gives the exit code."""
    from loadgen.terminal import plain_console  # noqa: PLC0415

    try:
        from analysis import (  # noqa: PLC0415
            checked,
            deaths,
            gpus,
            summary,
            throttled,
            visible,
            words,
        )

        finished = summary.finish(folder, slo, report=html)
    except ModuleNotFoundError as e:
        if result is None or e.name is None:
            raise
        return _only_recorded(folder, result, e.name)
    except StoreError:
        if result is not None and result.says:  # what came first must not be lost in what followed
            click.echo(f"loadgen: {result.says}", err=True)
        raise
    console = plain_console()
    console.print()
    for paragraph in words.verdict(finished):
        console.print(paragraph, soft_wrap=not console.is_terminal, highlight=False)
    for said in (checked.says(finished), visible.sentence(finished), throttled.sentence(finished),
                 deaths.sentence(finished), gpus.sentence(finished)):
        if said:
            console.print(said, style="dim", soft_wrap=not console.is_terminal, highlight=False)
    if result is not None and result.says:
        console.print(f"Stopped: {result.says}", style="dim", soft_wrap=not console.is_terminal,
                      highlight=False)
    if html:
        console.print(f"Report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    code = exit_code(finished, result)
    if code == INTERRUPTED and finished.manifest.plan is not None:
        console.print(f"Go on with: loadgen sweep --resume {folder}", soft_wrap=True,
                      highlight=False)
    return code


def _only_recorded(folder: Path, result: Any, missing: str) -> int:
    """A host that makes load needs no pandas, pyarrow, scipy or altair: the verdict in a line."""
    from loadgen import evidence, exits  # noqa: PLC0415
    from loadgen.judge import Criteria  # noqa: PLC0415
    from loadgen.store import RunFolder  # noqa: PLC0415

    kept = RunFolder(folder)
    manifest, legs = kept.manifest(), kept.legs()
    answer = None
    if manifest.plan is not None:
        answer = evidence.conclude(result.judgements, manifest.plan["axis"],
                          Criteria(manifest.target_frac, manifest.confidence))
        up_to = "" if answer.safe is None else f", up to {answer.safe:g}"
        click.echo(f"\n{answer.load}{up_to}. {result.says}")
    click.echo(f"No tables and no report, as there is no {missing} here; all is recorded, make "
               f"them where it is: loadgen report {folder}")
    return exits.exit_code(result.judgements, answer, legs[-1][1].ending
                           if legs and legs[-1][1] else None, result.stop)


def exit_code(finished: Any, result: Any) -> int:
    from analysis import gate  # noqa: PLC0415

    return gate.exit_code(finished, result.stop if result is not None else None)
