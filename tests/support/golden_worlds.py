"""Small worlds for the goldens of evaluations that read what earlier stages made: text with latents, scores, words.

Every number comes from numpy's generators. N tokens, D channels, F latents, L tokens per row.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import PREFIX, VOCABULARY, pack
from stored_latents import write_jsonl, write_parquet

from autointerp.latent_cache import build_latents
from autointerp.records import Explanation, JudgeCheck, LatentScore, ScoreItem, Simulation
from evals.base import EvalContext, SAESubject
from evals.results import SubjectInfo
from sae.activations import ActivationStore
from sae.config import InputNorm, SAEConfig
from sae.manifest import artefact_dir, key_of, writing
from sae.plugins import find

HOOKPOINT = "layers.1"
SPLITS = ("explain", "calibrate", "score")


def topk(dec_FD: np.ndarray, bias: float, k: int, name: str) -> SAESubject:
    """A TopK SAE whose encoder is its decoder."""
    f, d = dec_FD.shape
    cfg = SAEConfig(
        architecture="topk", activation="topk", d_in=d, d_out=d, d_sae=f, k=k, apply_b_dec_to_input=True,
        input_norm=InputNorm(kind="none"), decoder_unit_norm=True, sae_id=name, meta=None, train_tokens=0,
        train_steps=0, seed=0)  # fmt: skip
    sae = find("sae.architectures", "topk")(cfg)
    with torch.no_grad():
        sae.W_dec_FD.copy_(torch.from_numpy(dec_FD))
        sae.W_enc_FD.copy_(torch.from_numpy(dec_FD))
        sae.b_enc_F.fill_(bias)
        sae.b_dec_D.zero_()
    info = SubjectInfo(
        sae_id=name, kind="sae", lm="planted", lm_revision="0", hookpoint=HOOKPOINT, architecture="topk", d_in=d,
        d_sae=f, k=k, train_tokens=0, sae_sha256="0" * 64)  # fmt: skip
    return SAESubject(sae.requires_grad_(False), info)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def context(subject: SAESubject, root: Path, lm: Any = None, **more: Any) -> EvalContext:
    return EvalContext(root=root, subject=subject, preset="tiny", seed=0, hookpoint=HOOKPOINT, run_key="0" * 16,
                       load_lm=None if lm is None else lambda: lm, **more)  # fmt: skip


# -- text whose activations follow two tokens --------------------------------------------------------------------------
class PairLM:
    """x = embedding(token) + 0.6 embedding(token before); token 59 is N2G's filler."""

    D = 16

    def __init__(self) -> None:
        table = np.random.default_rng(11).standard_normal((VOCABULARY, self.D)).astype(np.float32)
        table[VOCABULARY - 1] = 0
        self.table, self.device, self.dtype = torch.from_numpy(table), torch.device("cpu"), torch.float32
        self.name, self.revision, self.tokenizer = "planted", "0", self
        self.bos_token_id = self.eos_token_id = PREFIX

    def check_hookpoint(self, hookpoint: str) -> int:
        return self.D

    def block_of(self, hookpoint: str) -> None:
        """No residual hookpoint: rows are read by `capture`."""

    def capture(self, ids_BL: torch.Tensor, hookpoints: Any) -> dict[str, torch.Tensor]:
        before = torch.roll(ids_BL, 1, dims=1)
        return {hookpoints[0]: self.table[ids_BL] + 0.6 * self.table[before]}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    def get_vocab(self) -> dict[str, int]:
        return {"<|endoftext|>": PREFIX}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [VOCABULARY - 1]


def pair_stores(lm: PairLM, root: Path) -> dict[str, ActivationStore]:
    """Three splits of 150 short documents; prefix tokens are dropped."""
    found = {}
    for i, split in enumerate(SPLITS):
        r = np.random.default_rng([5, i])
        share = 1 / (np.arange(1, VOCABULARY - 1) + 5)
        texts = [r.choice(np.arange(1, VOCABULARY - 1), size=r.integers(10, 90), p=share / share.sum()).tolist()
                 for _ in range(150)]  # fmt: skip
        tokens = pack(texts, split, root)
        ids = np.asarray(tokens.tokens_BL)
        x = lm.capture(torch.from_numpy(ids.astype(np.int64)), [HOOKPOINT])[HOOKPOINT].reshape(-1, lm.D)
        key = key_of("activations", 1, {"store_dtype": "float32"}, {"tokens": tokens.key})
        folder = artefact_dir(root, "activations", key)
        with writing(folder, kind="activations", key=key, stage_version=1, config={"store_dtype": "float32"},
                     inputs={"tokens": tokens.key}) as out:  # fmt: skip
            (out.path / "acts_ND.bin").write_bytes(x.numpy().tobytes())
            np.save(out.path / "filter.npy", np.where(ids == PREFIX, 2, 0).reshape(-1).astype(np.uint8))
            out.counts |= {"d_in": lm.D, "n_tokens": int(ids.size), "norm_median": 1.0, "n_dropped": {}}
        found[split] = ActivationStore.open(folder, tokens)
    return found


def n2g_context(root: Path) -> EvalContext:
    """Patterns are built here, as no explanation was made: walk, matching and floors are those of a run."""
    lm = PairLM()
    subject = topk(unit(np.random.default_rng(12).standard_normal((48, lm.D))), -0.3, 4, "planted.topk")
    cache = build_latents(root, subject.sae, pair_stores(lm, root))
    return context(subject, root, lm, latents=cache)


# -- scores ------------------------------------------------------------------------------------------------------------
def explanation_context(root: Path) -> EvalContext:
    """Two explainers and two scorers on 12 latents, floors, groups and failures; written and read as a run does."""
    import pandas as pd

    r = np.random.default_rng(21)
    texts, scores = [], []
    for latent in range(12):
        for explainer, chosen in (("pmi", latent % 3 > 0), ("n2g", latent % 3 == 0)):
            texts.append(Explanation(
                explanation_id=f"{explainer}{latent}", sae_id="planted", latent=latent, explainer=explainer, text="t",
                selected=chosen, calibrate_score=float(r.random())))  # fmt: skip
            scores += latent_scores(r, latent, explainer)
    checks = [
        JudgeCheck(judge="minilm", scorer="embedding", auc=0.86, ci_low=0.8, ci_high=0.9, wrong_auc=0.5, n=40,
                   weak=False),
        JudgeCheck(judge="lm", scorer="simulation", auc=0.6, ci_low=0.5, ci_high=0.7, wrong_auc=0.55, n=40),
    ]  # fmt: skip
    with writing(root / "explanations" / "e", kind="explanations", key="e", stage_version=1, config={}) as out:
        write_jsonl(out.path / "explanations.jsonl", texts)
    with writing(root / "scores" / "s", kind="scores", key="s", stage_version=1, config={},
                 inputs={"explanations": "e"}) as out:  # fmt: skip
        write_parquet(out.path / "scores.parquet", scores, LatentScore)
        write_parquet(out.path / "items.parquet", [], ScoreItem)
        write_parquet(out.path / "simulations.parquet", [], Simulation)
        write_jsonl(out.path / "judges.jsonl", checks)
    stats = pd.DataFrame({"n_active_score": 10.0 + 7 * np.arange(12)})
    cache = type("Latents", (), {"stats": stats, "key": "l"})()
    subject = topk(unit(r.standard_normal((16, 8))), 0.0, 2, "planted")
    return context(subject, root, latents=cache, scores=root / "scores" / "s")


def latent_scores(r: np.random.Generator, latent: int, explainer: str) -> list[LatentScore]:
    """Of one explanation: a judge of windows, with groups, and a simulation that fails on every fifth latent."""
    of, made = f"{explainer}{latent}", []
    base_rate = float(0.002 + 0.05 * r.random())
    for floor in ("", "shuffled"):
        drop = 0.25 if floor else 0.0
        values: dict[tuple[str, str, str], float | None] = {
            ("embedding", "auc", ""): float(0.9 - drop - 0.2 * r.random()),
            ("embedding", "recall", ""): float(0.8 - drop * r.random()),
            ("embedding", "phi", ""): float(0.1 + drop * r.random()),
            ("embedding", "precision", ""): float(0.3 * r.random()),
            ("embedding", "recall", "decile=2"): float(r.random()),
            ("embedding", "fpr", "kind=same_token"): float(r.random()),
            ("simulation", "pearson", ""): None if latent % 5 == 4 else float(0.5 - drop + 0.2 * r.standard_normal()),
        }
        made += [
            LatentScore(
                sae_id="planted", latent=latent, explanation_id=of, explainer=explainer, scorer=scorer,
                scorer_version=1, judge={"embedding": "minilm", "simulation": "lm"}[scorer], metric=metric, group=group,
                value=value, base_rate=base_rate, n_pos=20, n_neg=40, floor_kind=floor,
                null_reason=None if value is not None else "constant_prediction")
            for (scorer, metric, group), value in values.items()
        ]  # fmt: skip
    return made


# -- words -------------------------------------------------------------------------------------------------------------
class WordLM:
    """One token per word with its space; x = 3 g(letter) + 2.5 c(letter) for a third of the words + noise."""

    D, LETTERS, WORDS = 48, "abcdefghijklmnopqrstuvwx", 30

    def __init__(self) -> None:
        r = np.random.default_rng(31)
        self.texts = ["<|endoftext|>"]
        for letter in self.LETTERS:
            made = {letter + "".join("abcdefghij"[i] for i in r.integers(10, size=4)) for _ in range(self.WORDS)}
            self.texts += [f" {word}" for word in sorted(made)]
        self.index = {text: i for i, text in enumerate(self.texts)}
        self.letter_dirs, self.extra_dirs = (unit(r.standard_normal((len(self.LETTERS), self.D))) for _ in range(2))
        letters = np.array([self.LETTERS.index(t[1]) if len(t) > 1 and t[0] == " " else 0 for t in self.texts])
        extra = np.array([t[2:3] in "abc" and t[0] == " " for t in self.texts])
        x = 3 * self.letter_dirs[letters] + 2.5 * extra[:, None] * self.extra_dirs[letters]
        x += 0.35 * r.standard_normal(x.shape)
        self.table = torch.from_numpy(x.astype(np.float32))
        self.name, self.revision, self.tokenizer = "planted", "0", self
        self.device, self.dtype, self.bos_token_id, self.eos_token_id = torch.device("cpu"), torch.float32, 0, 0

    def check_hookpoint(self, hookpoint: str) -> int:
        return self.D

    def capture(self, ids_BL: torch.Tensor, hookpoints: Any) -> dict[str, torch.Tensor]:
        return {hookpoints[0]: self.table[ids_BL]}

    def get_vocab(self) -> dict[str, int]:
        return self.index

    def decode(self, ids: Any) -> str:
        return "".join(self.texts[i] for i in ids)

    def __call__(self, texts: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        one = [texts] if isinstance(texts, str) else texts
        ids = [[self.index[f" {w}"] for w in t.split() if f" {w}" in self.index] for t in one]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}


def absorption_context(root: Path) -> EvalContext:
    """Letters with a latent of their own, and one that takes over where the letter's extra direction is there."""
    lm = WordLM()
    together = unit(3 * lm.letter_dirs + 2.5 * lm.extra_dirs)
    return context(topk(np.concatenate([lm.letter_dirs, together]), -1.0, 2, "planted.letters"), root, lm)


CONTEXTS = {"n2g": n2g_context, "explanation": explanation_context, "absorption": absorption_context}
