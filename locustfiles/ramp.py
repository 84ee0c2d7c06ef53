"""Up until errors, an OOM or the SLO stop it; then the highest good level is proven again.

    locust -f locustfiles/ramp.py --headless -u 64 -t 4m              on the simulator
    locust -f locustfiles/ramp.py --headless -u 64 -t 10m --host http://127.0.0.1:8000 --slo ttft=1s
    locust -f locustfiles/ramp.py --headless --processes 4 -u 256 -t 10m --host …    many processes
    (or --master and --worker on many hosts: -u is of the whole fleet; see open_loop.py)

The search and the verdict are those of `loadgen sweep`; the run folder holds junit.xml and
summary.md for the build server. Exit codes: 0 a safe level was found, 1 none is safe, 3 the
measurement is invalid, 4 the server died, 5 inconclusive. -u is the highest level, -t the budget.
"""

from loadgen.fleet import LLMUser, RampShape


class Mixed(LLMUser):
    scenario = "mixed"


class UntilItBreaks(RampShape):
    to = 64
    budget = "4m"
