"""Locust's page, widened: a tab of what streaming is about, a page of live charts, the run folder
and the report.

    <base>/loadgen            live charts      <base>/loadgen/report     of the last test
    <base>/loadgen/live.json  their data       <base>/loadgen/run.zip    its run folder

With --web-login all of it is behind the login. It is served by the loop that stamps answers: views
send what `Live` has computed already, and leave the zipping to another process.
"""

import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from flask import Blueprint, Response, before_render_template, request, send_file
from flask.typing import ResponseReturnValue
from locust.env import Environment

from loadgen.fleet.form import Form, is_sent
from loadgen.fleet.lifecycle import Lifecycle
from loadgen.fleet.live import Now, Sample
from loadgen.scenario import Slo

NAME = "Streaming"
KEY = "loadgen"
PAGE = Path(__file__).with_name("live.html")
COLUMNS = {
    "name": "Class, last 30 s", "in_flight": "In flight", "requests": "Requests ended",
    "ttft_50": "TTFT p50 (ms)", "ttft_90": "TTFT p90 (ms)", "itl_90": "ITL p90 (ms)",
    "tok_rate": "Tokens/s", "good_rps": "Good req/s", "good_share": "Good",
}
TEMPLATE = {
    "extended_tabs": [{"title": NAME, "key": KEY}],
    "extended_tables": [{"key": KEY, "structure": [
        {"key": key, "title": title} for key, title in COLUMNS.items()]}],
    "extended_csv_files": [
        {"href": "./loadgen", "title": "Live charts of streaming (loadgen)"},
        {"href": "./loadgen/report", "title": "Report of the last test (loadgen)"},
        {"href": "./loadgen/run.zip", "title": "Run folder of the last test, as a zip (loadgen)"}],
}
LINK = (b'<a href="./loadgen" style="position:fixed;left:20px;bottom:16px;z-index:9;padding:9px '
        b'16px;border-radius:99px;background:#0b5d9e;color:#fff;font:600 14px system-ui,sans-serif;'
        b'text-decoration:none;box-shadow:0 1px 6px #0006">Live charts</a></body>')
# nothing from elsewhere: a report holds texts of servers (Vega compiles its expressions)
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' "
          "'unsafe-eval'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'")
WORDS = {
    "none": "No test has run yet.", "running": "The test is running; its report is made when it "
    "has stopped.", "making": "The report is being made; this page shows it when it is there.",
    "missing": "The last test has no report. The run folder holds what there is of it."}

log = logging.getLogger("loadgen")


def attach(environment: Environment, lifecycle: Lifecycle) -> None:
    """Before Locust's server starts."""
    web_ui = environment.web_ui
    assert web_ui is not None
    app = web_ui.app
    assert app is not None
    web_ui.template_args.update(TEMPLATE)
    base = getattr(environment.parsed_options, "web_base_path", "")
    pages, form = _Pages(lifecycle), Form(environment, lifecycle)
    routes = Blueprint("loadgen", __name__, url_prefix=base)
    for rule, view in (("", pages.live), ("/live.json", pages.data), ("/report", pages.report),
                       ("/run.zip", pages.zip)):
        routes.add_url_rule(f"/loadgen{rule}", view.__name__,
                            web_ui.auth_required_if_enabled(view))
    routes.after_request(_protect)
    app.register_blueprint(routes)
    check = web_ui.auth_required_if_enabled(form.check)
    app.before_request(lambda: check() if is_sent() else None)
    app.after_request(lambda answer: form.keep(answer) if is_sent() else pages.widen(answer))
    before_render_template.connect(form.fill, app, weak=False)
    log.info("live charts at %s://%s:%s%s/loadgen", "https" if web_ui.tls_cert else "http",
             web_ui.host or "localhost", web_ui.port, base)


def _protect(answer: Response) -> Response:
    """Locust lets every site read its pages (CORS); what servers said is not theirs."""
    answer.headers["Access-Control-Allow-Origin"] = request.host_url.rstrip("/")
    answer.headers["Content-Security-Policy"] = POLICY
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["Cache-Control"] = "no-store"
    return answer


class _Pages:
    """What is shown of a Lifecycle. Only files of its last run folder are served."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    def live(self) -> ResponseReturnValue:
        return Response(PAGE.read_bytes(), mimetype="text/html")

    def data(self) -> ResponseReturnValue:
        """`?test=NAME&since=T`: only the samples of that test after T; else all."""
        now = _state(self._lifecycle)
        since = request.args.get("since", -1.0, float) if request.args.get("test") == now[
            "test"] else -1.0
        now["samples"] = [s for s in self._lifecycle.live.samples if s.t_s > since]
        return Response(msgspec.json.encode(now), mimetype="application/json")

    def report(self) -> ResponseReturnValue:
        state, folder = _report_state(self._lifecycle), self._lifecycle.folder
        if state == "ready" and folder is not None:
            return send_file((folder / "report.html").resolve(), max_age=0)
        again = '<meta http-equiv="refresh" content="2">' if state == "making" else ""
        return (f'<!doctype html><meta charset="utf-8"><title>Report</title>{again}<body style='
                '"font:16px/1.5 system-ui,sans-serif;margin:15vh auto;max-width:36em;padding:0 1em'
                f';color-scheme:light dark"><p>{WORDS[state]}</p><p><a href="../loadgen">Live '
                'charts</a></p>', 404)

    def zip(self) -> ResponseReturnValue:
        """Of a running test: as far as it has come."""
        folder = self._lifecycle.folder
        if folder is None:
            return WORDS["none"], 404, {"Content-Type": "text/plain"}
        with tempfile.TemporaryDirectory(prefix="loadgen-") as place:
            path = Path(place) / "run.zip"
            done = subprocess.run(
                [sys.executable, "-m", "zipfile", "-c", str(path), str(folder.resolve())],
                capture_output=True, text=True, check=False)
            if done.returncode:
                log.error("no zip of %s: %s", folder, done.stderr[-500:])
                return "the run folder could not be zipped", 500, {"Content-Type": "text/plain"}
            return send_file(path.open("rb"), "application/zip", as_attachment=True,
                             download_name=f"{folder.name}.zip")

    def widen(self, answer: Response) -> Response:
        """Adds the tab's rows to Locust's statistics (the same answer comes again and again: its
        view is memoized), and a link to its page."""
        if answer.status_code == 200 and request.endpoint == "locust.request_stats":
            said = answer.get_json(silent=True)
            if isinstance(said, dict):
                said["extended_stats"] = [{"key": KEY, "data": _table(self._lifecycle)}]
                answer.set_data(msgspec.json.encode(said))
        elif answer.status_code == 200 and request.endpoint == "locust.index":
            answer.set_data(answer.get_data().replace(b"</body>", LINK))
        return answer


def _runner_state(lifecycle: Lifecycle) -> str:
    assert lifecycle.environment.runner is not None
    return str(lifecycle.environment.runner.state)


def _report_state(lifecycle: Lifecycle) -> str:
    """A key of WORDS, or "ready"."""
    if lifecycle.is_running or lifecycle.folder is None:
        return "none" if lifecycle.folder is None else "running"
    if lifecycle.report is not None and not lifecycle.report.ready():
        return "making"
    return "ready" if (lifecycle.folder / "report.html").is_file() else "missing"


def _state(lifecycle: Lifecycle) -> dict[str, Any]:
    """All that the live page shows, but for the samples."""
    live, run = lifecycle.live, lifecycle.live.shown
    now: dict[str, Any] = {
        "test": None, "state": "starting" if lifecycle.starting else _runner_state(lifecycle),
        "failed": lifecycle.failed, "report": _report_state(lifecycle), "rows": live.rows(),
        "fields": Sample.__struct_fields__, "failures": list(live.failures.values())}
    if run is None:
        return now
    mix, target = run.prepared.scenario, run.prepared.target
    leg = run.on.leg if run.on is not None else None
    return {
        **now, "test": run.folder.path.name, "scenario": mix.name, "about": mix.description,
        "model": target.model, "server": target.base_url,
        "simulated": lifecycle.said.get("simulated"), "target": run.prepared.criteria.target,
        "slo": {c.name: _limits(run.prepared.slo(c.name)) for c in mix.classes},
        "leg": {"phase": leg.phase, "axis": leg.axis, "value": leg.value} if leg else None}


def _limits(slo: Slo) -> dict[str, float]:
    """In seconds."""
    given = {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "itl": slo.itl_s, "e2e": slo.e2e_s}
    return {name: float(limit_s) for name, limit_s in given.items() if limit_s is not None}


def _table(lifecycle: Lifecycle) -> list[dict[str, str | int]]:
    rows = [_cells(row) for row in lifecycle.live.rows()]
    if lifecycle.failed and not lifecycle.live.running:
        rows.append({**dict.fromkeys(COLUMNS, ""), "name": f"Failed: {lifecycle.failed}"})
    return rows


def _cells(row: Now) -> dict[str, str | int]:
    share = "–" if row.good_frac is None else f"{row.good_frac:.1%}"
    return {"name": row.name, "in_flight": "–" if row.inflight is None else row.inflight,
            "requests": row.n,
            "ttft_50": _ms(row.ttft_p50_s), "ttft_90": _ms(row.ttft_p90_s),
            "itl_90": _ms(row.itl_p90_s), "tok_rate": f"{row.tok_rate:,.0f}",
            "good_rps": f"{row.good_rps:.2f}", "good_share": share}


def _ms(value_s: float | None) -> str:
    return "–" if value_s is None else f"{value_s * 1e3:,.1f}"
