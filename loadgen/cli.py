"""The command line: composition only. What follows `--` are options of the server."""

import secrets
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from loadgen import __version__, scenario
from loadgen.errors import (
    DIED,
    INCONCLUSIVE,
    INTERRUPTED,
    INVALID,
    PASS,
    SLO_MISSED,
    USAGE,
    FolderError,
    GeneratorError,
    LoadgenError,
    ScenarioError,
    ServerError,
    StoreError,
)
from loadgen.leg import Leg
from loadgen.measure import conclude, go_on, measure
from loadgen.options import (
    Group,
    asked_for,
    checked_url,
    duration,
    finite,
    kind,
    launched_of,
    levels_of,
    load_of,
    server_of,
    slo_of,
    target_options,
)
from loadgen.scenario import Closed, Open, Scenario, Seconds, Slo, Trace
from loadgen.target import base_of

_EXIT = {ScenarioError: USAGE, FolderError: USAGE, ServerError: DIED, StoreError: INVALID,
         GeneratorError: INVALID}
__all__ = ["DIED", "INCONCLUSIVE", "INTERRUPTED", "INVALID", "PASS", "SLO_MISSED", "USAGE", "entry",
           "main"]
DEFAULT_BUDGET = "230s"


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"],
                                           "max_content_width": 100})
@click.version_option(__version__, prog_name="loadgen")
def main() -> None:
    """Load tests for LLM servers whose number an engineer would sign.

    \b
    loadgen sweep --max-concurrency 128       how many concurrent requests are safe?
    loadgen run mixed --rate 4 --duration 60s one load, measured
    loadgen report runs/X --slo ttft=1s       judge an old run by other limits

    Exit codes: 0 pass, 1 SLO not met, 2 usage, 3 measurement invalid, 4 server died or cannot be
    reached, 5 inconclusive, 130 interrupted.
    """


@main.command()
@click.argument("name", metavar="[SCENARIO]", default="mixed")
@click.option("--max-concurrency", type=click.IntRange(1, 100_000), metavar="N",
              help="Ladder 1, 2, 4 … N of requests in flight (closed loop).")
@click.option("--max-rate", type=click.FloatRange(0, min_open=True), callback=finite, metavar="R",
              help="Ladder up to R requests per second (open loop, Poisson).")
@click.option("--levels", metavar="A,B,C", help="These levels instead of powers of two.")
@click.option("--budget", callback=duration, metavar="10m", default=DEFAULT_BUDGET,
              show_default=True,
              help="Time the whole search may take.")
@click.option("--restart/--no-restart", default=True, show_default=True,
              help="Start a server of ours again when a level has killed it.")
@click.option("--unit-step", is_flag=True, help="Then find the largest concurrency that the server "
              "survives, to the unit: by bisection, with a restart after each death, beyond the "
              "budget.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN",
              help="Go on with a search that was stopped: load, scenario, seed and server are the "
              "folder's. Beside it only --api-key, --header, --proxy, --metrics-port and "
              "--no-report may stand.")
@target_options
@click.pass_obj
def sweep(server_options: tuple[str, ...], /, name: str, max_concurrency: int | None,
          max_rate: float | None, levels: str | None, budget: Seconds, restart: bool,
          unit_step: bool, resume: Path | None, **options: Any) -> None:
    """How much load is safe? Climbs a ladder of levels, then proves the highest good one.

    \b
    loadgen sweep --max-concurrency 128
    loadgen sweep chat --max-concurrency 64 --base-url http://127.0.0.1:8000 --slo ttft=500ms
    loadgen sweep --max-rate 8 --server sim -- --gpu h200 --model qwen2.5-7b
    loadgen sweep --max-concurrency 128 --server vllm --model Qwen/Qwen2.5-7B-Instruct -- -tp 2
    loadgen sweep --resume runs/20261121-011500-mixed
    """
    if resume is not None:
        go_on(resume, server_options, options)
    from loadgen.ramp import SweepPlan, finest_of  # noqa: PLC0415  (heavy imports wait)

    if (max_concurrency is None) == (max_rate is None):
        raise click.UsageError("give --max-concurrency N or --max-rate R"
                               + (", not both" if max_rate else ""))
    axis: Literal["concurrency", "rate"] = "rate" if max_rate else "concurrency"
    if unit_step and axis == "rate":
        raise click.UsageError("--unit-step counts concurrent requests of a server that can die: "
                               "give --max-concurrency")
    ladder = levels_of(levels, float(max_concurrency or max_rate or 0), axis)

    def search(session: Any, view: Any) -> Any:
        from loadgen import runner  # noqa: PLC0415

        return runner.run_sweep(session, SweepPlan(
            axis=axis, levels=ladder, budget_s=float(budget), seed=session.seed,
            criteria=session.criteria,
            can_restart=restart and session.server.facts()["kind"] != "remote",
            finest=finest_of(float(budget)) if levels is None else None, checks=True),
            view, unit_step)

    measure(name, server_options, options, search, budget, (ladder[-1], axis))


@main.command()
@click.argument("name", metavar="SCENARIO")
@click.option("--concurrency", type=click.IntRange(1, 100_000), metavar="N",
              help="Closed loop: N requests in flight.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), callback=finite, metavar="R",
              help="Open loop: R requests per second, whatever the server does.")
@click.option("--arrivals", type=click.Choice(["constant", "poisson", "gamma"]),
              help="Gaps of the open loop. Default: poisson; with --cv: gamma.")
@click.option("--cv", type=click.FloatRange(0, 20, min_open=True), callback=finite,
              help="Coefficient of variation of gamma gaps; above 1 is bursty.")
@click.option("--timestamps", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Open loop at given instants: seconds from the start, one a line.")
@click.option("--quality", metavar="A,B,C", help="The same --num-prompts prompts at concurrency 1 "
              "and at each of these, at temperature 0: do answers change under load?")
@click.option("--duration", callback=duration, metavar="60s", help="Time that is measured.")
@click.option("--num-prompts", type=click.IntRange(1), metavar="N",
              help="Stop after N requests; of classes with turns: after N sessions.")
@click.option("--warmup", callback=duration, metavar="5s", help="Load before the measurement. "
              "Default: a fifth of the duration, at most 10 s; none with --num-prompts.")
@click.option("--max-inflight", type=click.IntRange(1), default=4096, show_default=True,
              help="Open loop: what would exceed it is DROPPED, never queued.")
@target_options
@click.pass_obj
def run(server_options: tuple[str, ...], /, name: str, **options: Any) -> None:
    """One load, measured.

    \b
    loadgen run mixed --rate 4 --duration 60s
    loadgen run chat --concurrency 16 --duration 30s --base-url http://127.0.0.1:8000
    loadgen run code --rate 2 --arrivals gamma --cv 2 --num-prompts 100
    loadgen run json-forced --quality 8,32 --num-prompts 100
    """
    chosen = scenario.load(name)
    if options["quality"] is not None:
        _quality(chosen, name, server_options, options)
    if options["seed"] is None:
        options["seed"] = secrets.randbelow(2**31)
    load = load_of(chosen, options, options["seed"])
    if options["duration"] and options["num_prompts"]:
        raise click.UsageError("give --duration or --num-prompts, not both")
    duration_s: Seconds | None = options["duration"] or chosen.duration_s
    if options["num_prompts"]:
        duration_s = None
    if isinstance(load, Trace) and duration_s is None:
        duration_s = Seconds(max(load.due_s, default=0.0) + 1.0)
    if duration_s is None and options["num_prompts"] is None:
        raise click.UsageError("give --duration or --num-prompts")
    whole = options["num_prompts"] is not None or isinstance(load, Trace)
    warmup_s = options["warmup"] or (0.0 if whole else min(10.0, 0.2 * (duration_s or 0.0)))
    value = (load.concurrency if isinstance(load, Closed)
             else load.rate_rps if isinstance(load, Open)
             else float(f"{len(load.due_s) / max(duration_s or 1.0, 1e-9):.3g}"))

    def drive(session: Any, view: Any) -> Any:
        from loadgen import runner  # noqa: PLC0415

        return runner.run_leg(session, Leg(
            id="run", axis="concurrency" if isinstance(load, Closed) else "rate",
            value=round(float(value), 6), phase="run", replicate=0, seed=session.seed,
            load=load, warmup_s=float(warmup_s),
            measure_s=None if duration_s is None else float(duration_s),
            num_sessions=options["num_prompts"]), view)

    axis = "concurrency" if isinstance(load, Closed) else "rate"
    measure(name, server_options, options, drive, None, (float(value), axis))


def _quality(chosen: Scenario, name: str, server_options: Sequence[str],
             options: dict[str, Any]) -> None:
    """The same prompts at several concurrencies, to the exit code."""
    others = [k for k in ("concurrency", "rate", "timestamps", "duration", "warmup", "virtual")
              if options[k]]
    if others or not options["num_prompts"]:
        raise click.UsageError("--quality wants --num-prompts N, and no load, duration or "
                               "--virtual beside it")
    if all(c.validator is None for c in chosen.classes):
        raise click.UsageError(f"scenario {chosen.name} has no validator: there is no answer to "
                               "compare. Shipped ones that have: json-forced, tools, translation …")
    levels = sorted({1.0, *levels_of(options["quality"], 100_000, "concurrency")})

    def drive(session: Any, view: Any) -> Any:
        import msgspec  # noqa: PLC0415

        from loadgen import runner  # noqa: PLC0415

        greedy = msgspec.structs.replace(session, scenario=session.scenario.greedy())
        return runner.run_legs(greedy, [Leg(
            id=f"quality-{level:g}", axis="concurrency", value=level, phase="run", replicate=0,
            seed=session.seed, load=Closed(int(level)), warmup_s=0.0, measure_s=None,
            num_sessions=options["num_prompts"], again=i > 0)
            for i, level in enumerate(levels)], view)

    measure(name, server_options, options, drive, None, (levels[-1], "concurrency"))


FILE = click.Path(dir_okay=False, path_type=Path)


def _print_schema(context: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        from analysis import gate  # noqa: PLC0415

        click.echo(gate.schema().decode(), nl=False)
        context.exit()


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--slo", "--goodput", "slos", multiple=True, metavar="NAME=LIMIT",
              help="Judge by these limits instead.")
@click.option("--html/--no-html", default=True, show_default=True, help="Write report.html.")
@click.option("--junit", type=FILE, metavar="FILE", help="JUnit XML, also there.")
@click.option("--markdown", type=FILE, metavar="FILE", help="The summary in Markdown, also there.")
@click.option("--json", "json_file", type=FILE, metavar="FILE",
              help="The verdict as JSON, also there. Its schema: --schema.")
@click.option("--step-summary", is_flag=True,
              help="Append the summary to the file that $GITHUB_STEP_SUMMARY names.")
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
              help="Print the JSON Schema of verdict.json.")
@click.option("--as", "dialect", type=click.Choice(["vllm-bench"]), help="Instead of all that: a "
              "result file for each level, with the keys, units and formulas of `vllm bench "
              "serve`, whose options the last four are.")
@click.option("--out", type=click.Path(path_type=Path), metavar="PATH", help="Where to: a folder, "
              "or of one level FILE.json. Default: RUN/vllm-bench.")
@click.option("--percentile-metrics", metavar="A,B", help="Default: ttft,tpot,itl; also e2el.")
@click.option("--metric-percentiles", metavar="P,Q", help="Default: 99.")
@click.option("--save-detailed", is_flag=True, help="Each request's figures as well.")
@click.option("--metadata", multiple=True, metavar="K=V", help="Another key; may be repeated.")
def report(folder: Path, slos: tuple[str, ...], html: bool, junit: Path | None,
           markdown: Path | None, json_file: Path | None, step_summary: bool,
           dialect: str | None, **its: Any) -> None:
    """Remake tables, verdict and report of a run from its journals; as a gate in CI, too.

    \b
    loadgen report runs/20261121-011500-mixed
    loadgen report runs/20261121-011500-mixed --slo ttft=1s
    loadgen report runs/ci --no-html --junit junit.xml --json verdict.json --step-summary
    loadgen report runs/20261121-011500-mixed --as vllm-bench --percentile-metrics ttft,tpot,e2el
    """
    from analysis import gate  # noqa: PLC0415

    if dialect is not None:
        _export(folder, slo_of(slos), **its)
        return
    if any(its.values()):
        raise click.UsageError("--out, --percentile-metrics, --metric-percentiles, "
                               "--save-detailed and --metadata go with --as vllm-bench")
    code = conclude(folder, slo_of(slos), html)
    for name, copy in (("junit.xml", junit), ("summary.md", markdown), ("verdict.json", json_file)):
        if copy is not None:
            gate.write(copy, (folder / name).read_bytes())
    if step_summary:
        _append_to_step_summary((folder / "summary.md").read_text(encoding="utf-8"))
    raise SystemExit(code)


def _export(folder: Path, slo: Slo | None, out: Path | None, percentile_metrics: str | None,
            metric_percentiles: str | None, save_detailed: bool,
            metadata: tuple[str, ...]) -> None:
    from analysis import frame, vllm_bench  # noqa: PLC0415

    done = vllm_bench.export(frame.load(folder, slo), out, vllm_bench.options_of(
        percentile_metrics, metric_percentiles, save_detailed, metadata))
    for line in vllm_bench.says(done):
        click.echo(line)


def _append_to_step_summary(text: str) -> None:
    import os  # noqa: PLC0415

    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8") as f:
            f.write(text)


@main.command()
@click.argument("kind", callback=kind, metavar="KIND")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--model", help="The folder or name that it serves; not of the simulator.")
@click.option("--server-cmd", metavar="COMMAND", help="Words that stand in for `vllm serve`; with "
              "transformers the Python that has it.")
@click.pass_obj
def serve(server_options: tuple[str, ...], /, kind: str, port: int, model: str | None,
          server_cmd: str | None) -> None:
    """Run a server in the foreground, without loading it: sim, vllm, transformers, FILE.py.

    \b
    loadgen serve sim --port 8000 -- --gpu 4090d --model qwen2.5-7b
    loadgen serve vllm --model Qwen/Qwen2.5-7B-Instruct --port 8000 -- --max-num-seqs 64
    """
    import os  # noqa: PLC0415

    from servers.launched import foreground  # noqa: PLC0415

    given = ["--port", str(port), *server_options]
    if kind != "sim":
        server = launched_of(kind, model, given, Path(os.devnull), server_cmd)
        command, env = server.command, server.env
    elif model or server_cmd:
        raise click.UsageError("--model and --server-cmd are for servers of models; the "
                               "simulator's options follow `--`, as -- --model qwen2.5-7b")
    else:
        command, env = [sys.executable, "-m", "servers.sim", *given], {}
    sys.stdout.flush()
    raise SystemExit(foreground(command, env))


@main.command()
@click.option("--base-url", metavar="URL", help="Also look at this server.")
@click.option("--calibrate", is_flag=True, help="Find out within a minute how much load one "
              "generator process of this host can make; runs are then held against it.")
def doctor(base_url: str | None, calibrate: bool) -> None:
    """Is this host fit to generate load? Names what would spoil a measurement, and the remedy.

    \b
    loadgen doctor
    loadgen doctor --base-url http://127.0.0.1:8000
    loadgen doctor --calibrate
    """
    from loadgen import doctor as checks  # noqa: PLC0415
    from loadgen.terminal import plain_console  # noqa: PLC0415

    if calibrate:
        if base_url:
            raise click.UsageError("--calibrate loads a server of its own; leave out --base-url")
        checks.calibrate(plain_console())
        return
    where = base_of(checked_url(base_url)) if base_url else None
    raise SystemExit(checks.show(plain_console(), where))


@main.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--max-regression", "limits", multiple=True, metavar="FIGURE=SHARE",
              help="Pass only if the figure surely is not worse by more: ttft_p99=10%. May be "
              "repeated. Figures: ttft, tpot, e2e with _p50, _p90, _p99; attainment, goodput.")
@click.option("--level", "levels", type=float, multiple=True, metavar="C",
              help="Compare only this level; may be repeated.")
@click.option("--allow", multiple=True, metavar="FIELD",
              help="Let this field of the manifests differ, as model or scenario.slo.")
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write it as JSON.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Write it as Markdown.")
def compare(base: Path, new: Path, limits: tuple[str, ...], levels: tuple[float, ...],
            allow: tuple[str, ...], json_file: Path | None, markdown: Path | None) -> None:
    """Is run NEW better or worse than BASE, beyond noise? Refuses runs that are not alike.

    Exit codes: 0 nothing is worse (each --max-regression holds), 1 something is, 2 not alike, 5
    these runs cannot tell.

    \b
    loadgen compare runs/before runs/after
    loadgen compare runs/main runs/branch --max-regression ttft_p99=10% --level 32
    """
    import msgspec  # noqa: PLC0415

    from analysis import compare as comparing  # noqa: PLC0415
    from analysis import comparison, frame, gate  # noqa: PLC0415
    from loadgen.terminal import plain_console  # noqa: PLC0415

    wanted = [comparing.limit_of(x) for x in limits]
    a, b = frame.load(base), frame.load(new)
    differ = {k: v for k, v in comparing.unlike(a, b).items() if k not in allow}
    if differ:
        raise ScenarioError("these runs are not alike: " + "; ".join(
            f"{k}: {v}" for k, v in differ.items()) + f". To compare them still: "
            f"{' '.join(f'--allow {k}' for k in differ)}")
    found = comparing.compare(a, b, wanted, levels, allow)
    comparison.show(plain_console(), found)
    if json_file is not None:
        gate.write(json_file, msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    if markdown is not None:
        gate.write(markdown, comparison.markdown(found).encode())
    raise SystemExit(found.exit_code)


@main.command()
@click.argument("name", required=False)
def scenarios(name: str | None) -> None:
    """List the shipped scenarios, or print one as a start for your own.

    \b
    loadgen scenarios
    loadgen scenarios mixed > my.toml
    """
    if name is not None:
        click.echo(scenario.find(name).read_text(encoding="utf-8"), nl=False)
        return
    for path in sorted(scenario.SHIPPED.glob("*.toml"), key=lambda x: x.stem):
        click.echo(f"{path.stem:16} {scenario.load(str(path)).description}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Campaign folder. Default: runs/NAME.")
@click.option("--report-only", is_flag=True,
              help="Run nothing: remake tables and report from the folder.")
def campaign(file: Path, out: Path | None, report_only: bool) -> None:
    """Servers × workloads × repeats, one after the other; ends in one comparative report.

    Started again, it goes on with the first cell that is not complete.

    \b
    loadgen campaign scenarios/campaigns/s2.toml
    loadgen campaign scenarios/campaigns/s2.toml --report-only
    """
    from loadgen import campaign as campaigns  # noqa: PLC0415
    from loadgen import cells  # noqa: PLC0415

    planned = campaigns.load(file)
    folder = out or Path("runs") / planned.name
    if not report_only:
        for done, again in cells.execute(planned, folder, _invoke, _lend, click.echo):
            said = done.outcome if done.outcome != "done" else f"exit code {done.code}"
            click.echo(f"{done.cell.folder}: {'' if again else 'complete already, '}{said}")
    kept = cells.read(folder)
    from analysis import campaign_report  # noqa: PLC0415

    for sentence in campaign_report.write(folder):
        click.echo(sentence)
    click.echo(f"Report: {folder / 'report.html'}")
    raise SystemExit(cells.exit_code(kept.campaign, kept.cells))


# -------------------------------------------------------------------------------------- inside


def _invoke(words: list[str], server: Any) -> tuple[int, str]:
    """One command with a server that is lent to it, to its exit code and what the operator must
    know; an error is said as it would be alone."""
    try:
        main(words, standalone_mode=False, obj=server)
    except LoadgenError as e:
        click.echo(f"loadgen: {e}", err=True)
        return _EXIT.get(type(e), USAGE), str(e)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED, "interrupted"
    except click.ClickException as e:
        e.show()
        return USAGE, e.format_message()
    except SystemExit as e:
        return (e.code if isinstance(e.code, int) else USAGE), ""
    except Exception as e:  # noqa: BLE001  (one cell's bug is not the end of the others)
        traceback.print_exc()
        return INVALID, f"{type(e).__name__}: {e}"
    return PASS, ""


def _lend(words: list[str], log: Path) -> Any:
    """The server of a cell's words, to be started once for several cells; None: each makes its
    own, which costs nothing."""
    options, own = asked_for(main, words, ("run", "sweep"))
    if options["virtual"] or options["base_url"]:
        return None
    return server_of(options, own, log.parent)


def entry(words: list[str] | None = None) -> None:
    """What the `loadgen` script runs: errors for the operator in one line, no traceback."""
    try:
        main(words, standalone_mode=False)
    except click.exceptions.Exit as e:
        raise SystemExit(e.exit_code) from None
    except click.ClickException as e:
        e.show()
        raise SystemExit(USAGE) from None
    except LoadgenError as e:
        click.echo(f"loadgen: {e}", err=True)
        raise SystemExit(_EXIT.get(type(e), USAGE)) from None
    except (KeyboardInterrupt, click.Abort):
        click.echo("loadgen: interrupted", err=True)
        raise SystemExit(INTERRUPTED) from None
    except Exception:  # noqa: BLE001  (a bug of ours must not read as "SLO not met")
        traceback.print_exc()
        raise SystemExit(INVALID) from None


if __name__ == "__main__":
    entry()
