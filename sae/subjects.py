"""What ``python -m sae train`` trains on: a model, its text and some hookpoints, or a folder of activations."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae.config import FilterConfig, SubjectMeta
from sae.errors import ArtefactError, ConfigError

if TYPE_CHECKING:
    import numpy as np

    from sae.activations import ActivationStore
    from sae.language_model import LanguageModel
    from sae.live_pair import LivePair
    from sae.paired import PairedStore
    from sae.streams import LiveStore
    from sae.tokens import TokenSet
    from sae.train_door import TrainDoor

    Source = ActivationStore | PairedStore | LiveStore | LivePair


class Subject(NamedTuple):
    """What a stream of activations is made of: one hookpoint, several, or a transcoder's two."""

    stores: "tuple[ActivationStore | LiveStore | None, ...]"
    """One per hookpoint; None where activations are still to be collected."""
    lm: "LanguageModel | None"
    """None where a folder of activations was given."""
    hookpoints: tuple[str, ...]
    widths: tuple[int, ...]
    tokens: "TokenSet"
    paired: bool = False
    """The two hookpoints are the inputs and the targets of transcoders."""

    @property
    def sources(self) -> "tuple[Source | None, ...]":
        """What training reads, one per hookpoint or one for a pair; None where some of it is not there."""
        from sae.activations import ActivationStore
        from sae.live_pair import LivePair
        from sae.paired import PairedStore
        from sae.streams import LiveStore

        if not self.paired:
            return self.stores
        inputs, targets = self.stores
        if isinstance(inputs, LiveStore):
            return (LivePair(inputs.stream),)
        if isinstance(inputs, ActivationStore) and isinstance(targets, ActivationStore):
            return (PairedStore(inputs, targets),)
        return (None,)

    @property
    def source_widths(self) -> tuple[tuple[int, ...], ...]:
        """Width of each source, or those of inputs and targets."""
        return (self.widths,) if self.paired else tuple((width,) for width in self.widths)


def open_store(folder: Path) -> "ActivationStore":
    """A complete activations folder and the tokens it was made from, which lie beside it."""
    from sae.activations import ActivationStore
    from sae.manifest import read_manifest
    from sae.tokens import TokenSet

    content = read_manifest(folder)
    if content.get("kind") != "activations":
        raise ArtefactError(f"{folder} holds {content.get('kind')}, expected activations")
    tokens = folder.resolve().parent.parent / "tokens" / str(content["inputs"]["tokens"])
    return ActivationStore.open(folder, TokenSet.open(tokens))


def subject(cfg: "TrainDoor") -> Subject:
    """Open the activations, or load the model and tokenise the text. Nothing is collected yet."""
    from sae.activations import stored_activations
    from sae.language_model import LanguageModel
    from sae.streams import LiveStream
    from sae.tokens import build_tokens

    if cfg.activations is not None:
        store = open_store(cfg.activations)
        stored = str(store.manifest["config"]["hookpoint"])
        if cfg.hookpoints not in ((), (stored,)):
            asked = ", ".join(cfg.hookpoints)
            raise ConfigError(f"{cfg.activations} was collected at {stored}, --hookpoint says {asked}")
        return Subject((store,), None, (stored,), (store.d_in,), store.tokens)
    lm = LanguageModel.load(cfg.model, dtype=cfg.dtype, device=cfg.device)
    hookpoints = cfg.hookpoints or (lm.default_hookpoint(),)
    hookpoints += (cfg.hookpoint_out,) if cfg.hookpoint_out else ()
    widths = tuple(lm.check_hookpoint(hookpoint) for hookpoint in hookpoints)
    sets = build_tokens(cfg.root, replace(cfg.tokens, text=cfg.texts), lm.name, lm.tokenizer, force=cfg.force)
    tokens, paired = sets["train"], cfg.hookpoint_out is not None
    if cfg.stream.source == "live":
        live = LiveStream(lm, tokens, hookpoints, cfg.filter, cfg.stream, cfg.stream.batch_rows)
        return Subject(live.stores, lm, hookpoints, widths, tokens, paired)
    reused = (None if cfg.force else stored_activations(cfg.root, lm, tokens, h, cfg.filter) for h in hookpoints)
    return Subject(tuple(reused), lm, hookpoints, widths, tokens, paired)


def collect(cfg: "TrainDoor", found: Subject) -> "Source":
    """:func:`collect_all` for a subject of one hookpoint, or of one pair."""
    (source,) = collect_all(cfg, found)
    return source


def collect_all(cfg: "TrainDoor", found: Subject) -> "list[Source]":
    """The activations of the subject; what is not there is collected now, all hookpoints in one pass."""
    from sae.activations import capture_many

    if None not in found.stores:
        return [source for source in found.sources if source is not None]
    lm = found.lm
    assert lm is not None
    stores = capture_many(
        cfg.root, lm, found.tokens, found.hookpoints, filter_cfg=cfg.filter, batch_rows=cfg.stream.batch_rows,
        force=cfg.force,
    )  # fmt: skip
    return [source for source in found._replace(stores=stores).sources if source is not None]


def meta_of(source: "Source", drop_ids: Sequence[int] = ()) -> SubjectMeta:
    """What an SAE file says of the activations, from their manifest. ``drop_ids``: what the filter drops by id."""
    from sae.live_pair import LivePair
    from sae.model_files import slug_of
    from sae.paired import PairedStore

    pair = source if isinstance(source, (PairedStore, LivePair)) else None
    store = source.inputs if isinstance(source, (PairedStore, LivePair)) else source
    target = None if pair is None else pair.targets.manifest["config"]["hookpoint"]
    made = store.manifest["config"]
    rules = made["filter"]
    return SubjectMeta(
        lm=made["lm"], lm_revision=made["lm_revision"], hookpoint=made["hookpoint"], lm_dtype=made["lm_dtype"],
        lm_slug=slug_of(str(made["lm"]).rpartition("/")[2]), context_length_tokens=store.tokens.L,
        tokens_key=store.tokens.key, activations_key=source.key, hookpoint_out=target,
        text_sources=tuple(sorted(set(store.tokens.sources))),
        token_filter={
            "drop_positions": list(rules["drop_positions"]), "drop_token_ids": list(drop_ids),
            "norm_multiple": rules["norm_multiple"], "norm_median": store.norm_median, "n_seen": store.n_tokens,
            "n_dropped": dict(store.n_dropped),
        },
    )  # fmt: skip


def short_meta(found: Subject, number: int) -> SubjectMeta:
    """What the name of an SAE needs of a source, without any activation."""
    from sae.model_files import slug_of

    store = found.stores[number]
    assert store is not None
    made = store.manifest["config"]
    return SubjectMeta(
        lm=made["lm"], lm_revision=made["lm_revision"], hookpoint=made["hookpoint"], lm_dtype=made["lm_dtype"],
        lm_slug=slug_of(str(made["lm"]).rpartition("/")[2]), context_length_tokens=store.tokens.L,
    )  # fmt: skip


def expected_kept(found: Subject, rules: FilterConfig, number: int = 0) -> "np.ndarray":
    """int64 flat indices that pass the rules which need no activation; the norm rule drops some in ten thousand. Of a
    source that is there, those that pass all."""
    import numpy as np

    from sae.live_pair import LivePair
    from sae.streams import LiveStore
    from sae.tokens import drop_ids

    source = found.sources[number]
    if source is not None and not isinstance(source, (LiveStore, LivePair)):
        return source.kept_N
    assert found.lm is not None
    rows = np.asarray(found.tokens.tokens_BL)
    keep = np.ones(rows.shape, dtype=bool)
    if rules.drop_special:
        keep &= ~np.isin(rows, np.array(drop_ids(found.lm.tokenizer), dtype=rows.dtype))
    keep[:, [p for p in rules.drop_positions if p < rows.shape[1]]] = False
    return np.flatnonzero(keep.reshape(-1))
