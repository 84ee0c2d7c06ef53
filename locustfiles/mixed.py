"""The mix of a scenario, in the shape that the scenario asks for.

    locust -f locustfiles/mixed.py --headless -u 16 -r 4 -t 60s       no shape: what the options say
    locust -f locustfiles/mixed.py --headless --scenario spike        4 users, 32, and 4 again

A scenario file may hold one of these (each number of users that holds is a leg of the report):

    shape = { kind = "steps", users = [1, 2, 4, 8], hold = "30s" }
    shape = { kind = "spike", base = 4, peak = 32, spike = "20s", hold = "30s" }
    shape = { kind = "soak", users = 16, hold = "30m" }
    shape = { kind = "ramp", to = 64, budget = "4m" }                 as locustfiles/ramp.py
"""

from loadgen.fleet import LLMUser, ScenarioShape


class Mixed(LLMUser):
    scenario = "mixed"


class AsTheScenarioSays(ScenarioShape):
    pass
