"""Prompt tokens of the shipped prompts, counted with SmolLM2's tokenizer: at most 10 % over AUTOINTERP 10."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from autointerp.client import Capabilities
from autointerp.config import ExemplarConfig, InterpConfig
from autointerp.estimate import StageEstimate, estimate
from autointerp.pipeline import plugins_of
from autointerp.scorers.intruder import PLUGIN as Intruder

pytestmark = pytest.mark.assets
FIFTY = ExemplarConfig(score_positive=50, score_silent=50, score_hard=0)
LIST, SLOTS = Capabilities(), Capabilities(slots=True)
MARGIN = 1.1


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    from sae.assets import cache_dir

    files = sorted((cache_dir() / "models").glob("smollm2-*/tokenizer.json"))
    if not files:
        from sae.language_model import LanguageModel

        return LanguageModel.load("default").tokenizer
    whole = Tokenizer.from_file(str(files[0]))
    return SimpleNamespace(
        bos_token_id=None,
        encode=lambda text, add_special_tokens=False: whole.encode(text, add_special_tokens=add_special_tokens).ids,
        decode=lambda ids, **_: whole.decode(list(ids), skip_special_tokens=False),
    )


def stages(tokenizer, capabilities, explainers, scorers, **options) -> dict[str, StageEstimate]:
    """Of two latents; a scorer's stage holds the true and the shuffled job of each."""
    made, judges = plugins_of(InterpConfig(explainers=explainers, scorers=(), **options))
    found = estimate(made, scorers, FIFTY, latents=2, tokenizer=tokenizer, capabilities=capabilities)
    return {s.stage: s for s in found if not s.once}


def test_explaining(tokenizer) -> None:
    budget = {"highlighted": 1_600, "token_activation": 1_400, "contrastive": 1_200, "output_side": 400}
    found = stages(tokenizer, LIST, tuple(budget), ())
    for name, most in budget.items():
        stage = found[f"explain.{name}"]
        assert stage.requests == 2 and stage.prompt_tokens / 2 <= MARGIN * most, (name, stage)


def test_judging_by_lists(tokenizer) -> None:
    from autointerp.scorers.detection import PLUGIN as Detection
    from autointerp.scorers.fuzzing import PLUGIN as Fuzzing

    found = stages(tokenizer, LIST, ("token_list",), (Detection(), Fuzzing()))
    for name, most in (("detection", 5_500), ("fuzzing", 6_200)):
        stage = found[f"score.{name}"]
        assert stage.requests == 4 * 10 and stage.prompt_tokens / 4 <= MARGIN * most, (name, stage)


DELPHI = {"explain, 40 windows": 2_800, "detection": 16_600, "fuzzing": 19_200}
"""Prompt tokens of a latent by delphi 0.1.3, counted in a run of its own on 32-token windows of the same tokenizer:
40 windows to explain, 50 + 50 to judge (AUTOINTERP 10)."""


def test_a_latent_costs_at_most_half_of_what_delphi_asks(tokenizer) -> None:
    """At equal numbers of exemplars: 40 windows to explain by, 50 + 50 to be judged twice."""
    from autointerp.explainers.highlighted import PLUGIN as Highlighted
    from autointerp.scorers.detection import PLUGIN as Detection
    from autointerp.scorers.fuzzing import PLUGIN as Fuzzing
    from autointerp.written import strongest_first

    class Forty(Highlighted):
        def shown(self, view):
            shown = strongest_first(view, 20)
            assert len(shown) == 40
            return shown

    wide = replace(FIFTY, explain_top=20, n_groups=20)
    explaining = estimate([Forty()], [], wide, latents=2, tokenizer=tokenizer, capabilities=LIST)
    judging = stages(tokenizer, LIST, ("token_list",), (Detection(), Fuzzing()))
    ours = {
        "explain, 40 windows": explaining[0].prompt_tokens / 2,
        "detection": judging["score.detection"].prompt_tokens / 4,
        "fuzzing": judging["score.fuzzing"].prompt_tokens / 4,
    }
    print({name: (round(ours[name]), most) for name, most in DELPHI.items()})
    assert sum(ours.values()) <= 0.5 * sum(DELPHI.values())
    assert ours["detection"] <= 0.5 * DELPHI["detection"] and ours["fuzzing"] <= 0.5 * DELPHI["fuzzing"]
    assert ours["explain, 40 windows"] <= DELPHI["explain, 40 windows"], "the same windows are most of that prompt"


def test_intruder(tokenizer) -> None:
    stage = stages(tokenizer, LIST, ("token_list",), (Intruder(trials=50),))["score.intruder"]
    assert stage.requests == 2 * 50 and stage.prompt_tokens / 2 <= MARGIN * 10_900, stage


@pytest.mark.parametrize(
    ("simulator", "capabilities", "most"), [("structured", LIST, 194), ("all_at_once", SLOTS, 607)]
)
def test_simulating(tokenizer, simulator, capabilities, most) -> None:
    """Tokens per window of 32; all_at_once reads its fixed 464 once where prefixes are shared."""
    from autointerp.scorers.simulation import PLUGIN as Simulation

    scorer = Simulation(simulator, windows_per_sign=50, calibrate_per_sign=0)
    stage = stages(tokenizer, capabilities, ("token_list",), (scorer,))["score.simulation"]
    assert stage.prompt_tokens / (4 * 100) <= MARGIN * most, (simulator, stage)
