"""Where latents are explained and scored: which SAE, model, language model and embedder, named so that any process can
open them. A :class:`Workplace` is plain values and may be pickled; what it opens is kept per process.
"""

import logging
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.client import CachedClient, Client, open_client
from autointerp.exemplars import ExemplarTable
from autointerp.interfaces import EmbedderLike, ExplainContext, ScoreContext
from autointerp.ledger import Ledger, load_prices
from autointerp.shared_replies import reply_files
from sae.errors import ConfigError

if TYPE_CHECKING:
    from sae.base import SAE
    from sae.language_model import LanguageModel

DEFAULT_CONCURRENCY = 32
SERVER_CLIENTS = ("openai", "vllm", "batch", "replay")
"""Clients that take the name of a model that is not loaded from here (--llm)."""
ONE_PROCESS_CLIENTS = ("vllm", "batch")
"""One object of these serves all parts: engines that fill their devices, files that are written as a whole."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """One SAE's explaining and scoring, by names."""

    root: Path
    sae_id: str
    model: str = "default"
    """Subject model: `default`, a folder or a hub id."""
    device: str = "cpu"
    client: str = "transformers"
    llm: str | None = None
    llm_revision: str | None = None
    base_url: str | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    """Requests in flight to a server."""
    timeout_s: float = 120.0
    """For one answer of a server, waiting for its turn included."""
    next_token: bool = False
    """openai: the server returns log-probabilities of its answer's first token."""
    replicas: int = 1
    """vllm: engines side by side."""
    engine_options: tuple[tuple[str, Any], ...] = ()
    """vllm: (name, value) pairs of :data:`autointerp.engine_options.ENGINE_OPTIONS`."""
    embedder: str = "default"
    seed: int = 0
    max_tokens: int | None = None
    max_cost_usd: float | None = None
    prices: Path | None = None

    def share(self, part: float, workers: int, spent_tokens: int = 0, spent_usd: float = 0.0) -> "Workplace":
        """The same for one of several parts of the work: its share of what is left of the budget, and of the places at
        the server."""
        left, left_usd = self.max_tokens, self.max_cost_usd
        return replace(
            self,
            max_tokens=None if left is None else int(max(0, left - spent_tokens) * part),
            max_cost_usd=None if left_usd is None else max(0.0, left_usd - spent_usd) * part,
            concurrency=max(1, self.concurrency // workers),
        )

    def without_budget(self) -> "Workplace":
        """What decides which objects are opened: neither budgets nor places at the server."""
        return replace(self, max_tokens=None, max_cost_usd=None, concurrency=1)


class Opened:
    """What a workplace names, each opened when first asked for. There is one language model behind all of it."""

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self._clients: dict[int, CachedClient] = {}

    @cached_property
    def sae(self) -> "SAE":
        from sae.checkpoint import load

        folder = self.place.root / "saes" / self.place.sae_id
        sae = load(folder).to(self.place.device)
        if sae.cfg.meta is None:
            raise ConfigError(f"{self.place.sae_id}: its cfg.json does not say where it reads; convert it anew")
        return sae

    @property
    def hookpoint(self) -> str:
        meta = self.sae.cfg.meta
        assert meta is not None
        return meta.hookpoint

    def lm(self, dtype: str = "auto") -> "LanguageModel":
        """The subject model; :class:`ConfigError` if the SAE was trained on another one."""
        lm = _language_model(self.place.model, dtype, self.place.device)
        meta = self.sae.cfg.meta
        if meta is not None and meta.lm_revision not in ("unknown", "", lm.revision):
            raise ConfigError(
                f"{self.place.sae_id} was trained on {meta.lm} ({meta.lm_revision[:12]}), and --model is {lm.name} "
                f"({lm.revision[:12]}); give the right --model"
            )
        self._begin_as_rows_do(lm.tokenizer)
        return lm

    def _begin_as_rows_do(self, tokenizer: Any) -> None:
        """The prefix of the rows on which the SAE was trained, where they lie here."""
        from sae.tokens import use_prefix_of

        meta = self.sae.cfg.meta
        use_prefix_of(tokenizer, self.place.root, meta.tokens_key if meta is not None else "")

    @cached_property
    def tokenizer(self) -> Any:
        """The subject's; its weights are not read for it."""
        from sae.model_files import resolve

        found = resolve(self.place.model).load_tokenizer()
        self._begin_as_rows_do(found)
        return found

    @cached_property
    def embedder(self) -> EmbedderLike | None:
        return _embedder(self.place.embedder, self.place.device)

    def client(self, place: Workplace | None = None) -> CachedClient:
        """The language model behind the reply cache; made with the budget of ``place``, which
        :meth:`CachedClient.allow` changes."""
        place = place or self.place
        lines = place.concurrency if place.client == "openai" else 0
        if lines not in self._clients:
            replies, known = reply_files(place.root)
            self._clients[lines] = open_client(
                place.client, replies=replies, known=known, max_tokens=place.max_tokens,
                max_cost_usd=place.max_cost_usd, ledger=Ledger(load_prices(place.prices)),
                backend=_backend(place.client, tuple(self._options(place).items())),
            )  # fmt: skip
        return self._clients[lines]

    def _options(self, place: Workplace) -> dict[str, Any]:
        named = {"model": place.llm} | ({"revision": place.llm_revision} if place.llm_revision else {})
        if place.client == "openai":
            known = {"concurrency": place.concurrency, "next_token": place.next_token, "timeout_s": place.timeout_s}
            return {**named, "base_url": place.base_url, **known}
        if place.client == "batch":
            return {**named, "folder": place.root / "batch"}
        if place.client == "vllm":
            return {**named, "replicas": place.replicas, **dict(place.engine_options)}
        if place.client == "transformers":
            return {**named, "device": place.device} if place.llm else {"lm": self.lm("float32")}
        if place.client == "replay":
            own, elsewhere = reply_files(place.root)
            return {**named, "replies": elsewhere or own, "next_token": place.next_token}
        if place.llm or place.base_url:
            raise ConfigError(f"--client {place.client} takes no --llm or --base-url")
        return {}

    def explaining(self, needs: frozenset[str], place: Workplace | None = None) -> ExplainContext:
        """Context for plug-ins with these needs: what none needs is not opened."""
        from autointerp.last_acts import make_last_acts

        wanted = needs & {"lm", "last_acts"}
        lm = self.lm() if wanted else None
        return ExplainContext(
            seed=self.place.seed, client=self.client(place), embedder=self.embedder, lm=lm,
            sae=self.sae if wanted else None, tokenizer=self.tokenizer, hookpoint=self.hookpoint,
            last_acts=make_last_acts(lm, self.sae, self.hookpoint) if lm is not None else None,
        )  # fmt: skip

    def scoring(self, needs: frozenset[str], place: Workplace | None = None) -> ScoreContext:
        """Context for plug-ins with these needs."""
        steers = needs & {"lm", "sae"}
        return ScoreContext(
            seed=self.place.seed, client=self.client(place), embedder=self.embedder, tokenizer=self.tokenizer,
            lm=self.lm("float32") if steers else None, sae=self.sae if steers else None, hookpoint=self.hookpoint,
        )  # fmt: skip


@lru_cache(maxsize=4)
def _language_model(model: str, dtype: str, device: str) -> "LanguageModel":
    from sae.language_model import LanguageModel

    return LanguageModel.load(model, dtype=dtype, device=device)


@lru_cache(maxsize=2)
def _backend(name: str, options: tuple[tuple[str, Any], ...]) -> Client:
    """One per process and set of options: a second engine would find the device full."""
    from sae.plugins import find

    backend: Client = find("autointerp.clients", name)(**dict(options))
    return backend


@lru_cache(maxsize=2)
def _embedder(name: str, device: str) -> EmbedderLike | None:
    from autointerp.embedder import Embedder

    return Embedder.choose(name, device=device)


def opened(place: Workplace) -> Opened:
    """What ``place`` names, kept for the jobs to come of this process. Budgets and places at the server are not part
    of what is kept: pass the place itself where a client is asked for."""
    return _opened(place.without_budget())


@lru_cache(maxsize=4)
def _opened(place: Workplace) -> Opened:
    return Opened(place)


def forget_clients() -> None:
    """The next command of this process opens its own: a batch of requests is that of one command."""
    _opened.cache_clear()
    _backend.cache_clear()


def needs_of(plugins: Any) -> frozenset[str]:
    """All that these plug-ins need."""
    return frozenset().union(*(p.needs for p in plugins)) if plugins else frozenset()


@lru_cache(maxsize=4)
def exemplar_table(folder: Path) -> ExemplarTable:
    """An exemplar table, read once per process."""
    return ExemplarTable.open(folder)
