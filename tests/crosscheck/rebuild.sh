#!/usr/bin/env bash
# Goldens of the cross-checks anew by the peers themselves: rebuild.sh PYTHON_WITH_SAESCOPE
# One environment below the cache folder holds sae-bench 0.6.0, and with it SAELens 6.54.12 and sae-probes 0.4.2.
set -euo pipefail
cd "$(dirname "$0")/../.."
ours=$1
venv=${SAESCOPE_CACHE:-$HOME/.cache/saescope}/crosscheck/sae_bench
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! "$venv/bin/python" -c "import sae_bench" 2>/dev/null; then
  "${PYTHON:-python3}" -m venv "$venv"
  # torch first and alone keeps a local CPU build; the registry's torchvision breaks `import transformers` beside it.
  "$venv/bin/pip" install --quiet torch==2.13.0
  echo torch==2.13.0 >"$venv/constraints.txt"
  "$venv/bin/pip" install --quiet -c "$venv/constraints.txt" sae-bench==0.6.0 sae-lens==6.54.12 sae-probes==0.4.2
  "$venv/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec
fi
export PYTHONPATH=.:tests/support:tests/crosscheck
"$ours" -c "import sys, pathlib, tiny; tiny.save_tiny_lm(pathlib.Path(sys.argv[1]))" "$work"
"$ours" tests/crosscheck/probe_inputs.py "$work" "$work/cache"
"$ours" tests/crosscheck/embedded_inputs.py "$work/cache" tests/crosscheck/goldens/codes_embedded.npz
"$venv/bin/python" tests/crosscheck/make_core.py "$work" tests/crosscheck/goldens/core.json
"$venv/bin/python" tests/crosscheck/make_probes.py "$work/cache" tests/crosscheck/goldens/probes.json
"$venv/bin/python" tests/crosscheck/make_embedded.py "$work/cache" tests/crosscheck/goldens/probes_embedded.json
"$ours" -m pytest tests/crosscheck
