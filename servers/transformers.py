"""Hugging Face's `model.generate` that is launched: `hf/app.py`, or `transformers serve`.

The app is the default, as `transformers serve` (5.19) generates one answer after the other, refuses
a request with `ignore_eos`, which all shipped scenarios send (HTTP 422), and passes over
temperature and top_p where the model's own default is not to sample."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from loadgen.errors import ScenarioError
from loadgen.target import Target
from servers import gpus
from servers.base import option
from servers.launched import LaunchedServer, program
from servers.vllm_log import model_config

APP = Path(__file__).with_name("hf") / "app.py"
_FACTS = "facts: "


class TransformersServer(LaunchedServer):
    """`instead`: the Python that has torch and transformers, by default this one; or the words of
    another server, as `transformers serve`, which then gets MODEL --host --port and the options."""

    kind = "transformers"

    def words(self, instead: list[str]) -> list[str]:
        rest = [self.model, "--host", self.host, "--port", str(self.port),
                *self.options]
        if instead and not _is_python(instead):
            return [program(instead[0]), *instead[1:], *rest,
                    *([] if option(self.options, "--dtype") else ["--dtype", "bfloat16"])]
        if not instead and importlib.util.find_spec("transformers") is None:
            raise ScenarioError(
                "this Python has no transformers: pip install 'loadgen[transformers]', or name "
                "one that has, as --server-cmd /path/to/venv/bin/python")
        name = option(self.options, "--served-model-name") or self.model
        self.target = Target(self.target.base_url, name)
        python = [program(instead[0]), *instead[1:]] if instead else [sys.executable]
        return [*python, str(APP), *rest]

    def learned(self, log: list[str]) -> dict[str, Any]:
        if not any("Application startup complete" in x for x in log):
            return {}
        said = [x.partition(_FACTS)[2] for x in log if _FACTS in x]
        own = json.loads(said[-1]) if said else {}
        return {**own, **gpus.facts(), "model_config": model_config(self.model)}


def _is_python(words: list[str]) -> bool:
    return Path(words[0]).name.startswith("python") and all(x.startswith("-") for x in words[1:])
