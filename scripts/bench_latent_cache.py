"""Memory and time of a latent cache: ``python scripts/bench_latent_cache.py [--tokens 1000000 --d-sae 32768 --k 32
--saes 1]``.

Everything but the encoder is real: the store is read, entries are sorted, spilt, merged, counted and written. Codes are
drawn (Zipf-like frequencies, so that some latents are frequent), since an encoder of that width would be measured
instead. Prints one line of JSON: peak resident memory, processor seconds, bytes per nonzero.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autointerp.latent_cache import build_latents_many
from sae.activations import ActivationStore
from sae.base import SAE
from sae.config import InputNorm, SAEConfig
from sae.manifest import artefact_dir, key_of, writing
from sae.plugins import find
from sae.tokens import TokenSet

L, D_IN, VOCABULARY, DOCUMENT = 512, 8, 5000, 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=32_768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--saes", type=int, default=1, help="so many SAEs in one pass")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = _store(root, options.tokens)
        saes = [_sae(options.d_sae, options.k, seed) for seed in range(options.saes)]
        before, began, wall = _peak_mb(), time.process_time(), time.monotonic()
        caches = build_latents_many(root, saes, {"explain": store})
        seconds = time.process_time() - began
        files = [f for cache in caches for f in cache.folder.iterdir()]
        n = sum(f.stat().st_size for f in files if "flat" in f.name or "value" in f.name)
        entries = sum(int(cache.stats["n_active"].sum()) for cache in caches)
        print(json.dumps({
            "tokens": options.tokens, "d_sae": options.d_sae, "k": options.k, "saes": options.saes, "nonzeros": entries,
            "peak_mb": round(_peak_mb()), "peak_before_mb": round(before), "cpu_s": round(seconds, 1),
            "wall_s": round(time.monotonic() - wall, 1), "bytes_per_nonzero": round(n / entries, 2),
        }))  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _store(root: Path, n_tokens: int) -> ActivationStore:
    """Random tokens in documents of 400; activations of a few channels."""
    rng = np.random.default_rng(0)
    rows = -(-n_tokens // L)
    key = key_of("tokens", 1, {"rows": rows})
    folder = artefact_dir(root, "tokens", key)
    with writing(folder, kind="tokens", key=key, stage_version=1, config={"split": "explain", "context_tokens": L,
                                                                           "prefix_id": 0}) as out:  # fmt: skip
        ids = rng.integers(1, VOCABULARY, size=(rows, L)).astype(np.uint16)
        ids[:, 0] = 0
        np.save(out.path / "tokens_BL.npy", ids)
        starts = np.arange(1, rows * L, DOCUMENT, dtype=np.int64)
        np.save(out.path / "doc_starts.npy", starts)
        np.save(out.path / "source_of_doc.npy", np.zeros(len(starts), dtype=np.int32))
        out.counts |= {"sources": ["drawn"]}
    tokens = TokenSet.open(folder)
    key = key_of("activations", 1, {"rows": rows})
    folder = artefact_dir(root, "activations", key)
    with writing(folder, kind="activations", key=key, stage_version=1, config={"store_dtype": "float32"},
                 inputs={"tokens": tokens.key}) as out:  # fmt: skip
        (out.path / "acts_ND.bin").write_bytes(rng.standard_normal((rows * L, D_IN)).astype(np.float32).tobytes())
        np.save(out.path / "filter.npy", np.where(ids == 0, 2, 0).astype(np.uint8).reshape(-1))
        out.counts |= {"d_in": D_IN, "n_tokens": rows * L, "norm_median": 1.0, "n_dropped": {}}
    return ActivationStore.open(folder, tokens)


def _sae(d_sae: int, k: int, seed: int) -> SAE:
    """A TopK SAE whose codes are drawn instead of computed."""
    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=D_IN, d_out=D_IN, d_sae=d_sae, k=k, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="layer_norm"), decoder_unit_norm=True, sae_id=f"drawn-f{d_sae}-k{k}-s{seed}",
        meta=None, train_tokens=0, train_steps=0, seed=seed,
    )  # fmt: skip
    sae: SAE = find("sae.architectures", "topk")(cfg)
    generator = torch.Generator().manual_seed(seed)

    def drawn(x_ND: torch.Tensor) -> Any:
        n = len(x_ND)
        # One latent in each of k equal ranges, low numbers in a range more often: k different latents a token.
        width = d_sae // k
        within = (torch.rand(n, k, generator=generator) ** 3 * width).long()
        indices = within + torch.arange(k) * width
        return torch.rand(n, k, generator=generator) + 0.1, indices

    object.__setattr__(sae, "encode_sparse", drawn)
    return sae.requires_grad_(False)


if __name__ == "__main__":
    main()
