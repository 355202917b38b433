"""Next-token losses of a language model whose activations are replaced at the hookpoint (METRICS B, D).

B rows, L tokens per row, D = d_in, V vocabulary, M scored positions of a batch. Losses in nats per token.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evals.units import Block, blocks

if TYPE_CHECKING:
    import torch

    from sae.activations import ActivationStore
    from sae.upper import UpperRunner

BATCH_TOKENS = 1_024
UNEMBED_TOKENS = {"cpu": 64, "cuda": 1_024}
"""Logits are made for this many positions at a time: 64 x 49,152 floats are 12 MB, which a processor's cache holds."""
MEMO_BYTES = 400_000_000
"""Clean hidden states are kept for all subjects up to this size, else computed again."""


def scored_positions(
    keep_BL: np.ndarray, doc_BL: np.ndarray, ids_BL: np.ndarray, special: tuple[int, ...],
) -> np.ndarray:
    """Mask [B, L]: the prediction made at t counts if t passed the filter and token t+1 is ordinary, same document."""
    score = np.zeros_like(keep_BL, dtype=bool)
    same = doc_BL[:, 1:] == doc_BL[:, :-1]
    score[:, :-1] = keep_BL[:, :-1] & same & ~np.isin(ids_BL[:, 1:], np.asarray(special, dtype=np.int64))
    return score


class Batch(NamedTuple):
    """Rows of one upper pass."""

    number: int
    block: Block
    ids_BL: "torch.Tensor"
    keep_BL: "torch.Tensor"
    score_BL: "torch.Tensor"
    doc_M: np.ndarray
    """Document of each scored position."""
    next_M: "torch.Tensor"
    """Token to be predicted."""


class Passes:
    """Upper passes over the chosen rows, always in the same batches, so that equal input gives equal bits."""

    def __init__(self, upper: "UpperRunner", store: "ActivationStore", rows: np.ndarray, special: tuple[int, ...],
                 device: Any = "cpu") -> None:
        self.upper, self.store, self.rows, self.special, self.device = upper, store, rows, special, device
        self.unembed_tokens = UNEMBED_TOKENS.get(str(device).partition(":")[0], UNEMBED_TOKENS["cpu"])

    def batches(self, title: str) -> Any:
        """Iterator of Batch, behind a progress bar."""
        import torch

        for number, block in enumerate(blocks(self.store, self.rows, BATCH_TOKENS, title)):
            ids = np.asarray(self.store.tokens.tokens_BL[block.rows_B], dtype=np.int64)
            score = scored_positions(block.keep_BL, block.doc_BL, ids, self.special)
            following = torch.from_numpy(np.roll(ids, -1, axis=1)[score])
            yield Batch(number, block, torch.from_numpy(ids), torch.from_numpy(block.keep_BL),
                        torch.from_numpy(score), block.doc_BL[score], following.to(self.device))

    def predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """(token, token to be predicted) of every scored position, in the order of the batches; reads no activation."""
        ids = np.asarray(self.store.tokens.tokens_BL[self.rows], dtype=np.int64)
        keep, doc = (np.asarray(of_N).reshape(-1, ids.shape[1])[self.rows]
                     for of_N in (self.store.keep_N, self.store.doc_of_N))
        score = scored_positions(keep, doc, ids, self.special)
        return ids[score], np.roll(ids, -1, axis=1)[score]

    def states(self, batch: Batch, resid_BLD: "torch.Tensor") -> "torch.Tensor":
        """What logits are made from at the scored positions: final hidden states [M, D], or logits of a fall-back."""
        resid, score = resid_BLD.to(self.device), batch.score_BL.to(self.device)
        if self.upper.is_exact:
            return self.upper.hidden(resid)[score]
        return self.upper.logits(resid, ids_BL=batch.ids_BL.to(self.device))[score]

    def log_probs(self, states_MX: "torch.Tensor") -> "torch.Tensor":
        """[M, V] float32; a KL is never the log of a softmax."""
        logits = self.upper.unembed(states_MX) if self.upper.is_exact else states_MX
        return logits.float().log_softmax(dim=-1)

    def losses(self, batch: Batch, states_MX: "torch.Tensor") -> np.ndarray:
        """Next-token loss [M] of one arm."""
        found = []
        for start in range(0, len(states_MX), self.unembed_tokens):
            part = slice(start, start + self.unembed_tokens)
            log_p = self.log_probs(states_MX[part])
            found.append(-log_p.gather(1, batch.next_M[part, None])[:, 0].double().cpu().numpy())
        return np.concatenate(found) if found else np.zeros(0)

    def constant_losses(self, batch: Batch, value: "torch.Tensor") -> np.ndarray:
        """Next-token loss [M] with every kept position replaced by one ``value`` (D) or scalar.

        Rows that are then equal (the same positions kept, the same vectors at the others, which in packed text is often
        the first token alone) need one pass for all of them: only what is to be predicted differs.
        """
        import torch

        x, kept = batch.block.x_BLD, batch.keep_BL[..., None]
        resid = torch.where(kept, value, x)
        first, row_of_B = distinct_rows(batch.keep_BL, x)
        if not self.upper.is_exact or len(first) == len(x):
            return self.losses(batch, self.states(batch, resid))
        hidden = self.upper.hidden(resid[first].to(self.device))
        loss_BL = torch.zeros(batch.score_BL.shape, dtype=torch.float64)
        next_BL = torch.zeros(batch.score_BL.shape, dtype=torch.long, device=self.device)
        next_BL[batch.score_BL.to(self.device)] = batch.next_M
        for u, states_LD in enumerate(hidden):
            of = torch.nonzero(row_of_B == u)[:, 0]
            for start in range(0, len(states_LD), self.unembed_tokens):
                part = slice(start, start + self.unembed_tokens)
                log_p = self.log_probs(states_LD[part])
                target = next_BL[of.to(self.device), part].T
                loss_BL[of, part] = -log_p.gather(1, target).T.double().cpu()
        return loss_BL[batch.score_BL].numpy()


def distinct_rows(keep_BL: "torch.Tensor", x_BLD: "torch.Tensor") -> "tuple[list[int], torch.Tensor]":
    """(first row of each kind, kind [B]); rows are of a kind if they keep the same positions and have the same bits at
    all others."""
    import torch

    known: dict[bytes, int] = {}
    first: list[int] = []
    kinds = []
    for i, (keep_L, x_LD) in enumerate(zip(keep_BL, x_BLD, strict=True)):
        key = keep_L.numpy().tobytes() + x_LD[~keep_L].float().cpu().numpy().tobytes()
        if key not in known:
            known[key] = len(first)
            first.append(i)
        kinds.append(known[key])
    return first, torch.tensor(kinds)


def compare(
    passes: Passes, batch: Batch, clean: "torch.Tensor", arms: "dict[str, torch.Tensor]",
) -> dict[str, np.ndarray]:
    """Per scored position [M]: `ce` (clean), and per arm `ce.<arm>`, `kl.<arm>`, `top1.<arm>`."""
    found: dict[str, list[np.ndarray]] = {}

    def note(name: str, values: Any) -> None:
        found.setdefault(name, []).append(values.double().cpu().numpy())

    for start in range(0, max(1, len(clean)), passes.unembed_tokens):
        part = slice(start, start + passes.unembed_tokens)
        target = batch.next_M[part, None]
        log_p = passes.log_probs(clean[part])
        p, top = log_p.exp(), log_p.argmax(dim=-1)
        note("ce", -log_p.gather(1, target)[:, 0])
        for arm, states in arms.items():
            log_q = passes.log_probs(states[part])
            note(f"ce.{arm}", -log_q.gather(1, target)[:, 0])
            note(f"top1.{arm}", (log_q.argmax(dim=-1) == top))
            note(f"kl.{arm}", (p * log_q.sub_(log_p).neg_()).sum(dim=-1))
    return {name: np.concatenate(parts) for name, parts in found.items()}
