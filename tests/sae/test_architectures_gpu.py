"""Every architecture trained on a GPU beside the CPU: figures agree, bits do not; what is saved runs on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted_pairs import TRANSCODER, Pairs
from planted_store import META, PlantedStore, planted_store

from sae import checkpoint, metrics
from sae.plugins import find, names
from sae.train import train_many

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
OPTIONS = {"topk, multi": {"multi_topk": True}, "relu, norm": {"l1_decoder_norm": True}}


@pytest.mark.parametrize("case", [*names("sae.architectures"), *OPTIONS])
def test_a_gpu_trains_what_a_cpu_trains(case: str, tmp_path: Path) -> None:
    name = case.split(",")[0]
    transcodes = find("sae.architectures", name).transcodes
    store = (Pairs if transcodes else PlantedStore)(planted_store(n=8_200, d=64, g=96).x_ND[:8_192], "gpu")
    cfg = replace(
        TRANSCODER, architecture=name, d_sae=128, k=4, l1=0.05, train_tokens=256 * 100,
        input_norm="dataset_rms" if transcodes else "layer_norm", **OPTIONS.get(case, {}),
    )  # fmt: skip
    figures = []
    for device in ("cpu", "cuda"):
        (folder,) = train_many(tmp_path / device, store, [cfg], META, device=device)
        sae = checkpoint.load(folder)
        wanted = store.read_target(store.kept_N) if isinstance(store, Pairs) else store.x_ND
        figures.append((metrics.fvu(wanted, sae(store.x_ND)), metrics.l0(sae.encode_sparse(store.x_ND))))
    (fvu, l0), (gpu_fvu, gpu_l0) = figures
    assert fvu is not None and gpu_fvu == pytest.approx(fvu, rel=0.1)
    assert gpu_l0 == pytest.approx(l0, rel=0.1)
