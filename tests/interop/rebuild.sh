#!/usr/bin/env bash
# Goldens and the record of exports, made anew by the libraries themselves: rebuild.sh PYTHON_WITH_SAESCOPE
# Each library gets an environment of its own below $INTEROP (default .venv-interop), as their pins exclude each other.
set -euo pipefail
export PYTHONHASHSEED=0  # SAELens writes the fields of exported configurations in the order of a set
cd "$(dirname "$0")/../.."
ours=$1
envs=${INTEROP:-.venv-interop}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
libraries="saelens:sae-lens==6.54.12 dictionary_learning:dictionary-learning==0.1.0 sparsify:eai-sparsify==1.3.3
  llamascopium:llamascopium==2.0.0b34"
for entry in $libraries; do
  name=${entry%%:*} package=${entry#*:} venv=$envs/${entry%%:*}
  if [ ! -f "$venv/ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    # torch first and alone keeps a local CPU build; the registry's torchvision breaks `import transformers` beside it.
    "$venv/bin/pip" install --quiet torch==2.13.0
    echo torch==2.13.0 >"$venv/constraints.txt"
    # Llamascopium 2.0.0b34 imports what TransformerLens 4 removed.
    [ "$name" = llamascopium ] && echo "transformer-lens<4" >>"$venv/constraints.txt"
    "$venv/bin/pip" install --quiet -c "$venv/constraints.txt" "$package"
    "$venv/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec
    touch "$venv/ready"
  fi
  rm -rf "tests/interop/goldens/$name"
  "$venv/bin/python" "tests/interop/make_$name.py" "tests/interop/goldens/$name"
done
# These two need torch and what SAELens brings; the package e2e-sae cannot be imported whole (see make_e2e_sae.py).
"$envs/saelens/bin/pip" install --quiet --no-deps circuit-tracer==0.5.0 e2e-sae==2.1.1
for name in circuit_tracer e2e_sae; do
  rm -rf "tests/interop/goldens/$name"
  "$envs/saelens/bin/python" "tests/interop/make_$name.py" "tests/interop/goldens/$name"
done
PYTHONPATH=. "$ours" tests/interop/exports.py "$out"
"$envs/saelens/bin/python" tests/interop/check_exports.py circuit_tracer "$out/circuit_tracer" tests/interop/goldens
for entry in $libraries; do
  name=${entry%%:*}
  "$envs/$name/bin/python" tests/interop/check_exports.py "$name" "$out/$name" tests/interop/goldens
done
PYTHONPATH=. "$ours" tests/interop/exports.py "$out" --record
"$ours" -m pytest tests/interop
