"""Run as a script: the cost of one training, either predicted or paid. Prints one JSON line.

Seconds are those of this process's processor, so that other processes change little.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

time.perf_counter = time.process_time


def main(what: str) -> None:
    torch.set_num_threads(1)
    from planted_store import META, PlantedStore

    from sae import predict
    from sae.config import TrainConfig
    from sae.train import train_many

    # Steps and weights large against what every process takes.
    x_ND = torch.randn(12_000, 24, generator=torch.Generator().manual_seed(0)).relu() @ torch.randn(24, 256)
    store = PlantedStore(x_ND)
    common = {"d_sae": 4_096, "k": 16, "batch_tokens": 1_024, "aux_k": 64, "ema_decay": 0.99}
    cfgs = [TrainConfig(architecture=name, train_tokens=24 * 1_024, **common) for name in ("topk", "batchtopk")]
    predict.reset_peak()
    base = predict.peak_bytes()
    if what == "predict":
        trial = predict.try_training(store, cfgs, META, torch.device("cpu"))
        line = predict.training_line(cfgs, trial, 0)
        found = {"seconds": line.seconds, "memory": line.memory_bytes - base, "disk": line.disk_bytes}
    else:
        with tempfile.TemporaryDirectory() as root:
            begun = time.perf_counter()
            folders = train_many(Path(root), store, cfgs, META)
            seconds = time.perf_counter() - begun
            disk = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
        found = {"seconds": seconds, "memory": predict.peak_bytes() - base, "disk": disk}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
