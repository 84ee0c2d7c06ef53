"""Chat users: each asks, reads the streamed answer to its end, and asks again.

    locust -f locustfiles/chat.py                                  the web page, on the simulator
    locust -f locustfiles/chat.py --host http://127.0.0.1:8000     … on a server of yours
    locust -f locustfiles/chat.py --headless -u 32 -r 8 -t 60s     in CI: exit code 0, 1, 3, 4, 5
    locust -f locustfiles/chat.py --headless -u 64 -r 64 -t 60s --rate 4     open loop: 4 per second
"""

from loadgen.fleet import LLMUser


class Chat(LLMUser):
    scenario = "chat"
