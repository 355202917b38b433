"""Run as a script, ``predict|pay disk|live``: what SAEs at two hookpoints cost, from text on. Prints one JSON line.

Seconds are those of this process's processor, so that other processes change little.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

time.perf_counter = time.process_time


def main(what: str, source: str) -> None:
    torch.set_num_threads(1)
    from tiny import save_tiny_lm, write_texts

    from sae import predict, train_door

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = save_tiny_lm(root / "lm", layers=4, width=256)
        texts = write_texts(root / "texts.jsonl", documents=2_500)
        words = (
            f"--model={model} --texts={texts} --root={root / 'results'} --hookpoint=layers.1,layers.2 --dtype=float32 "
            "--tokens.context-tokens=64 --tokens.train-tokens=65536 --tokens.explain-tokens=1024 "
            "--tokens.calibrate-tokens=1024 --tokens.score-tokens=1024 --tokens.test-tokens=1024 "
            "--train.d-sae=1536 --train.k=16 --train.batch-tokens=1024 --train.train-tokens=49152 --train.aux-k=64 "
            f"--stream.source={source} --stream.buffer-tokens=16384 --stream.prefetch=off"
        ).split()
        cfg = train_door.parse([*words, "--grid", "architecture=topk,batchtopk"])
        cfgs = train_door.grid_configs(cfg.train, cfg.grid)
        found = train_door.subject(cfg)
        predict.reset_peak()
        base = predict.peak_bytes()
        if what == "predict":
            expected = train_door.predict(cfg, cfgs, found)
            cost = {
                "seconds": expected.seconds, "memory": expected.memory_bytes - base, "disk": expected.disk_bytes,
                "of": [(line.stage, round(line.seconds, 2), line.note) for line in expected.lines],
            }  # fmt: skip
        else:
            begun = time.perf_counter()
            train_door.run(cfg, cfgs, found)
            seconds = time.perf_counter() - begun
            kinds = [root / "results" / kind for kind in ("activations", "saes")]
            disk = sum(path.stat().st_size for kind in kinds for path in kind.rglob("*") if path.is_file())
            cost = {"seconds": seconds, "memory": predict.peak_bytes() - base, "disk": disk}
    print(json.dumps(cost))


if __name__ == "__main__":
    main(*sys.argv[1:])
