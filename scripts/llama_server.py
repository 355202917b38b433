"""llama.cpp's server with the embedded model, OpenAI's API on a local port: for `make llm` and for trying things out.

Runs in an environment of its own that holds xllamacpp (`scripts/llm_servers.sh` makes it); nothing of saescope is
imported. Prints one line of JSON with the URL once it answers, and runs until its standard input is closed.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--slots", type=int, default=8, help="requests served at a time")
    parser.add_argument("--context", type=int, default=2048, help="tokens per slot")
    parser.add_argument("--threads", type=int, default=1, help="two collapse on a busy machine")
    options = parser.parse_args()
    if not options.model.is_file():
        sys.exit(f"there is no model {options.model}; sae.assets.fetch('smollm2') gives the folder of the embedded one")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.model_alias = {"smollm2"}
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel, params.n_ctx = options.slots, options.slots * options.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_gpu_layers = 0
    params.use_jinja = True
    server = xllamacpp.Server(params)
    print(json.dumps({"base_url": f"{server.listening_address}/v1", "model": "smollm2"}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
