"""Exact log-probabilities from a local causal LM, reading no token twice.

All sequences of a call form one trie, so a prompt is read once for its many continuations, and a common beginning once
for all. The trie is cut into packs: a pack is a set of branches laid out in one row, where a 4-D mask lets each token
see its own ancestors only (tree attention, as in SpecInfer, arXiv 2305.09781, section 4). The chain that all sequences
begin with is read once and its keys and values are shared. Only rows that somebody asked for meet the output
embedding. The method is compared once with plain forward passes; a model for which it does not hold (no 4-D masks,
recurrent state, scaled logits) is read plainly.

Letters: B packs per batch, T tokens per pack, P tokens of the shared beginning, V vocabulary.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MIN_SHARED_TOKENS = 16
"""A shorter common beginning is not worth a pass of its own."""
ROWS_PER_HEAD_CALL = 256
"""Rows x V logits held at a time."""
TOLERANCE_NATS = {torch.float32: 5e-3, torch.float64: 5e-3}
LOW_PRECISION_TOLERANCE_NATS = 0.25


@dataclass(frozen=True)
class Query:
    """Ask for log P(token | sequence[: position + 1]) for each of ``token_ids``."""

    position: int
    token_ids: tuple[int, ...]


Sequences = Sequence[tuple[Sequence[int], Sequence[Query]]]
"""(token ids, what is asked along them); tokens after the last asked position are not read."""
OnDone = Callable[[int, list[list[float]]], None]
"""(index of the sequence, one list of log-probabilities per query)."""


@dataclass
class _Node:
    token: int
    parent: "_Node | None"
    depth: int
    children: dict[int, "_Node"] = field(default_factory=dict)
    asked: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    """(sequence, query, token ids)"""


@dataclass
class _Pack:
    nodes: list[_Node]
    """Parents before children."""
    owned: list[int]
    """Indices of the nodes whose queries are answered here; the others are repeated ancestors."""


def _grow(sequences: Sequences) -> _Node:
    root = _Node(-1, None, -1)
    for s, (ids, queries) in enumerate(sequences):
        node, at = root, {}
        for position in range(max((q.position for q in queries), default=-1) + 1):
            node = node.children.get(ids[position]) or _child(node, ids[position])
            at[position] = node
        for q, query in enumerate(queries):
            at[query.position].asked.append((s, q, query.token_ids))
    return root


def _child(node: _Node, token: int) -> _Node:
    child = _Node(token, node, node.depth + 1)
    node.children[token] = child
    return child


def _shared_chain(root: _Node) -> list[_Node]:
    chain, node = [], root
    while len(node.children) == 1:
        node = next(iter(node.children.values()))
        chain.append(node)
    return chain


def _leaf_paths(top: _Node) -> Iterator[list[_Node]]:
    """Paths from below ``top`` to each leaf, depth first, in a fixed order."""
    stack = [[child] for _, child in sorted(top.children.items(), reverse=True)]
    while stack:
        path = stack.pop()
        while len(path[-1].children) == 1:
            path.extend(path[-1].children.values())
        if not path[-1].children:
            yield path
        stack.extend([*path, child] for _, child in sorted(path[-1].children.items(), reverse=True))


def _packs(top: _Node, pack_tokens: int) -> list[_Pack]:
    """Branches below ``top`` in packs of about ``pack_tokens`` nodes; every node is owned by one pack."""
    packs: list[_Pack] = []
    where: dict[int, int] = {}
    done: set[int] = set()
    for path in _leaf_paths(top):
        new = [n for n in path if id(n) not in where]
        if not packs or len(packs[-1].nodes) + len(new) > pack_tokens:
            packs.append(_Pack([], []))
            where, new = {}, path
        pack = packs[-1]
        for node in new:
            where[id(node)] = len(pack.nodes)
            if id(node) not in done:
                done.add(id(node))
                pack.owned.append(len(pack.nodes))
            pack.nodes.append(node)
    return packs


class LocalScorer:
    """``LocalScorer(model)`` around a Hugging Face causal LM in eval mode."""

    def __init__(self, model: Any, *, batch_tokens: int = 1024, pack_tokens: int = 256, mode: str = "auto") -> None:
        """``mode``: "auto" checks tree attention once and falls back to "plain"; "tree" and "plain" force one."""
        self.model, self.batch_tokens, self.pack_tokens, self.mode = model, batch_tokens, pack_tokens, mode
        self.device, self.dtype = model.device, model.dtype
        self.n_read = 0
        """Tokens read so far."""
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        self.window_tokens = window if isinstance(window, int) else None
        """Attention that forgets: the masks here do not know of it, so longer rows are read plainly."""

    @torch.inference_mode()
    def score(self, sequences: Sequences, on_done: OnDone | None = None) -> list[list[list[float]]]:
        """Per sequence and query the log-probabilities (nats) of its token ids, in order.

        ``on_done`` hears of a sequence as soon as its last query is answered.
        """
        if self.mode == "auto":
            self.mode = "tree" if self._tree_holds(sequences) else "plain"
        answers: list[list[list[float]]] = [[[] for _ in queries] for _, queries in sequences]
        open_queries = [len(queries) for _, queries in sequences]
        for s, n in enumerate(open_queries):
            if n == 0 and on_done is not None:
                on_done(s, [])
        for s, q, values in self._answers(sequences, plain=self.mode == "plain"):
            answers[s][q] = values
            open_queries[s] -= 1
            if open_queries[s] == 0 and on_done is not None:
                on_done(s, answers[s])
        return answers

    def _answers(self, sequences: Sequences, *, plain: bool) -> Iterator[tuple[int, int, list[float]]]:
        if plain:
            yield from self._plain(sequences)
            return
        root = _grow(sequences)
        chain = _shared_chain(root)
        shared: Any = None
        packs = _packs(root, self.pack_tokens)
        longest = max((len(p.nodes) for p in packs), default=0)
        if self.window_tokens is not None and len(chain) + longest > self.window_tokens:
            yield from self._plain(sequences)
            return
        if len(chain) >= MIN_SHARED_TOKENS and len(packs) > 1:
            shared, hidden_PD = self._read_chain(chain)
            yield from self._ask([(n, hidden_PD[i]) for i, n in enumerate(chain) if n.asked])
            packs = _packs(chain[-1], self.pack_tokens)
        for batch in self._batches(packs, [len(p.nodes) for p in packs]):
            hidden_BTD = self._read_packs(batch, shared, len(chain) if shared is not None else 0)
            yield from self._ask(
                [(p.nodes[i], hidden_BTD[b, i]) for b, p in enumerate(batch) for i in p.owned if p.nodes[i].asked]
            )

    def _batches(self, items: Sequence[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
        """Neighbours in length together, at most ``batch_tokens`` per batch, padding included."""
        order = sorted(range(len(items)), key=lambda i: (lengths[i], i))
        batch: list[Any] = []
        for i in order:
            if batch and (len(batch) + 1) * lengths[i] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(items[i])
        if batch:
            yield batch

    def _read_chain(self, chain: Sequence[_Node]) -> tuple[Any, Tensor]:
        """Key-value cache of the shared beginning, and its hidden states [P, D]."""
        ids_1P = torch.tensor([[n.token for n in chain]], device=self.device)
        out = self.model.base_model(input_ids=ids_1P, use_cache=True)
        self.n_read += ids_1P.numel()
        return out.past_key_values, out[0][0]

    def _read_packs(self, packs: Sequence[_Pack], shared: Any, n_shared: int) -> Tensor:
        """Hidden states [B, T, D] of a batch of packs behind ``n_shared`` = P tokens whose keys are in ``shared``."""
        width, n_packs = max(len(p.nodes) for p in packs), len(packs)
        ids_BT, positions_BT = np.zeros((2, n_packs, width), dtype=np.int64)
        seen_BTK = np.zeros((n_packs, width, n_shared + width), dtype=bool)
        seen_BTK[:, :, :n_shared] = True
        for b, pack in enumerate(packs):
            place = {id(n): i for i, n in enumerate(pack.nodes)}
            for i, node in enumerate(pack.nodes):
                ids_BT[b, i], positions_BT[b, i] = node.token, node.depth
                parent = place.get(id(node.parent))
                if parent is not None:
                    seen_BTK[b, i] = seen_BTK[b, parent]
                seen_BTK[b, i, n_shared + i] = True
            for i in range(len(pack.nodes), width):  # padding sees itself, so that no row of the softmax is empty
                seen_BTK[b, i, n_shared + i] = True
        hidden = torch.from_numpy(~seen_BTK)
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill(hidden, torch.finfo(self.dtype).min)
        past = copy.deepcopy(shared)
        if past is not None:
            past.batch_repeat_interleave(n_packs)
        self.n_read += sum(len(p.nodes) for p in packs)
        return self.model.base_model(
            input_ids=torch.from_numpy(ids_BT).to(self.device),
            position_ids=torch.from_numpy(positions_BT).to(self.device),
            attention_mask=mask[:, None].to(self.device),
            past_key_values=past,
            use_cache=past is not None,
        )[0]

    def _ask(self, rows: Sequence[tuple[_Node, Tensor]]) -> Iterator[tuple[int, int, list[float]]]:
        for start in range(0, len(rows), ROWS_PER_HEAD_CALL):
            part = rows[start : start + ROWS_PER_HEAD_CALL]
            log_p = self.log_probs(torch.stack([h for _, h in part]))
            yield from _gather([n.asked for n, _ in part], log_p)

    def log_probs(self, hidden_RD: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [R, V] float32, log of their normaliser [R]) of final hidden states."""
        logits_RV = self.model.get_output_embeddings()(hidden_RD).float()
        return logits_RV, torch.logsumexp(logits_RV, -1)

    def _plain(self, sequences: Sequences) -> Iterator[tuple[int, int, list[float]]]:
        """One row per sequence, right-padded, the model's own logits."""
        kept = [s for s, (_, queries) in enumerate(sequences) if queries]
        length = {s: max(q.position for q in sequences[s][1]) + 1 for s in kept}
        for batch in self._batches(kept, [length[s] for s in kept]):
            width = max(length[s] for s in batch)
            ids_BT = torch.zeros((len(batch), width), dtype=torch.long)
            mask_BT = torch.zeros((len(batch), width), dtype=torch.long)
            for b, s in enumerate(batch):
                ids_BT[b, : length[s]] = torch.tensor(list(sequences[s][0][: length[s]]))
                mask_BT[b, : length[s]] = 1
            self.n_read += int(mask_BT.sum())
            logits_BTV = self.model(
                input_ids=ids_BT.to(self.device), attention_mask=mask_BT.to(self.device), use_cache=False
            ).logits
            for b, s in enumerate(batch):
                queries = sequences[s][1]
                logits_RV = logits_BTV[b, [q.position for q in queries]].float()
                asked = [[(s, i, q.token_ids)] for i, q in enumerate(queries)]
                yield from _gather(asked, (logits_RV, torch.logsumexp(logits_RV, -1)))

    def _tree_holds(self, sequences: Sequences) -> bool:
        """Compare both ways on pieces of the first sequence: a shared beginning, two branches, every row asked."""
        ids = next((list(s[:40]) for s, queries in sequences if queries and len(s) > 1), [0, 1])
        trunk = (ids * (MIN_SHARED_TOKENS + 2))[: MIN_SHARED_TOKENS + 2]
        ends = [ids[::-1][:5] + [ids[0]], ids[:4] + [ids[-1]], [ids[-1], ids[0]]]
        target = tuple(sorted(set(ids)))[:8]
        trial = [
            (trunk + end, [Query(p, target) for p in range(len(trunk) - 1, len(trunk) + len(end))]) for end in ends
        ]
        plain = {(s, q): v for s, q, v in self._answers(trial, plain=True)}
        pack_tokens, self.pack_tokens = self.pack_tokens, 4
        try:
            tree = {(s, q): v for s, q, v in self._answers(trial, plain=False)}
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            logger.info("tree attention is off for this model (%s: %s); reading plainly", type(error).__name__, error)
            return False
        finally:
            self.pack_tokens = pack_tokens
        worst = max(abs(a - b) for key in plain for a, b in zip(plain[key], tree[key], strict=True))
        allowed = TOLERANCE_NATS.get(self.dtype, LOW_PRECISION_TOLERANCE_NATS)
        if not worst <= allowed:
            logger.info("tree attention is off for this model (log-probabilities differ by %.3g nats)", worst)
        return worst <= allowed


def _gather(
    asked: Sequence[Sequence[tuple[int, int, tuple[int, ...]]]], log_p: tuple[Tensor, Tensor]
) -> Iterator[tuple[int, int, list[float]]]:
    """Read all asked (row, token) pairs with one index operation."""
    logits_RV, norm_R = log_p
    rows = [r for r, entries in enumerate(asked) for _, _, ids in entries for _ in ids]
    tokens = [t for entries in asked for _, _, ids in entries for t in ids]
    values = (logits_RV[rows, tokens] - norm_R[rows]).tolist()
    start = 0
    for entries in asked:
        for s, q, ids in entries:
            yield s, q, values[start : start + len(ids)]
            start += len(ids)
