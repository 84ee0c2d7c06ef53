"""A stand-in for `vllm serve`: vLLM's log and its habit of leaving processes behind, the
simulator's answers. `python tests/fake_vllm.py MODEL [--host H] [--port P] …`"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

LOGS = Path(__file__).parent / "data" / "vllm" / "logs"
SLEEP = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--die-as", help="ends at once, with that log")
    parser.add_argument("--die-by", type=int, help="ends at once, by that signal")
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument("--fault")
    parser.add_argument("--linger-as", help="when it is dead, says that log and does not end")
    parser.add_argument("--hf-token")
    options, _ = parser.parse_known_args()
    if options.die_by:
        os.kill(os.getpid(), options.die_by)
    if options.die_as:
        sys.stdout.write((LOGS / options.die_as).read_text(encoding="utf-8"))
        sys.exit(1)
    print((LOGS / "start_0.32_cpu.log").read_text(encoding="utf-8"), flush=True)
    # an engine that neither shares our session nor hears SIGTERM
    subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True)
    time.sleep(options.start_s)
    sim = [sys.executable, "-m", "servers.sim", "--host", options.host, "--port", options.port,
           "--served-model-name", *(options.served_model_name or [options.model]), "--speed", "10"]
    if key := os.environ.get("VLLM_API_KEY"):
        sim += ["--api-key", key]
    if options.fault:
        sim += ["--fault", options.fault]
    sys.stdout.flush()
    if options.linger_as:
        subprocess.call(sim, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print((LOGS / options.linger_as).read_text(encoding="utf-8"), flush=True)
        time.sleep(300)
    os.execv(sys.executable, sim)


if __name__ == "__main__":
    main()
