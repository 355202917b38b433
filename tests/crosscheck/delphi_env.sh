#!/usr/bin/env bash
# delphi 0.1.3 in an environment of its own below the cache folder, for scripts/bench_delphi.py. About 2.3 GB, minutes.
# Without vLLM, which it requires and which only its own engine uses (4 GB more): time_delphi.py stands in for the names.
set -euo pipefail
venv=${SAESCOPE_CACHE:-$HOME/.cache/saescope}/crosscheck/delphi
"$venv/bin/python" -c "import delphi.pipeline, faiss, plotly, sparsify, tiktoken" 2>/dev/null && exit 0
"${PYTHON:-python3}" -m venv "$venv"
# torch first and alone keeps a local CPU build; the registry's torchvision breaks `import transformers` beside it.
"$venv/bin/pip" install --quiet torch==2.13.0
echo torch==2.13.0 >"$venv/constraints.txt"
"$venv/bin/pip" install --quiet -c "$venv/constraints.txt" --no-deps eai-delphi==0.1.3
"$venv/bin/pip" install --quiet -c "$venv/constraints.txt" eai-sparsify==1.3.3 transformers==5.24.0 orjson jaxtyping \
  blobfile aiofiles "anyio>=4.8.0" "asyncer>=0.0.8" beartype faiss-cpu sentence-transformers tiktoken plotly pandas httpx
"$venv/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec
