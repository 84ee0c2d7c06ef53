"""An open loop over workers: --rate requests per second in all, each planned arrival once, whatever
the server does. No -u is needed: the load is arrivals, not users.

    locust -f locustfiles/open_loop.py --headless --processes 2 -t 20s --rate 100 \\
        --host http://127.0.0.1:8000 --model M

    export LOADGEN_FLEET_TOKEN=$(openssl rand -hex 16)      the same on all hosts
    locust -f locustfiles/open_loop.py --headless --master --master-bind-host 0.0.0.0 \\
        --expect-workers 3 -t 60s --rate 300 --host http://server:8000
    locust -f locustfiles/open_loop.py --worker --master-host master --shards 4

Exit codes: 0 pass, 1 SLO not met, 3 the measurement is invalid (a worker was lost, an arrival has
no record), 4 the server died, 5 inconclusive.
"""

from loadgen.fleet import LLMUser


class OpenLoop(LLMUser):
    scenario = "mixed"
    open_loop = True
