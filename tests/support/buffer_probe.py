"""Run as a script: how much memory a shuffle buffer takes over many refills. Prints one JSON line, in bytes."""

import json
import sys

import numpy as np
import torch


def main(window: int, width: int, block: int, batch: int, refills: int) -> None:
    torch.set_num_threads(1)
    from sae import predict
    from sae.buffer import INDEX_BYTES, Block, Feed, Slots, batches

    x_ND = torch.randn(block, width).bfloat16()
    blocks = (Block([x_ND.clone()], [np.arange(i * block, (i + 1) * block)]) for i in range(refills))
    predict.reset_peak()
    base = predict.peak_bytes()
    slots = Slots(window, [width], torch.bfloat16, torch.device("cpu"))
    places = [x.data_ptr() for x in slots.x_SD]
    feed = Feed(slots, blocks, threaded=True)
    n_batches = sum(1 for _ in batches(feed, batch, seed=0, first=0, last=refills * block // batch))
    stated = (window + 2 * block) * width * 2 + window * (INDEX_BYTES + 8) + batch * width * 10
    # 10: a batch as it is taken, as float32, and the one before it that the loop still holds
    found = {
        "stated": stated, "taken": predict.peak_bytes() - base, "batches": n_batches,
        "moved": int([x.data_ptr() for x in slots.x_SD] != places),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
