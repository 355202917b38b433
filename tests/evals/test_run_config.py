"""One training configuration per architecture, each with its own options alone."""

from dataclasses import replace

from evals.run_config import quick
from sae.config import TrainConfig


def test_options_of_other_architectures_do_not_change_an_sae() -> None:
    names = ("topk", "relu", "gated", "jumprelu", "batchtopk")
    base = quick()
    options = replace(base.train, multi_topk=True, l1_decoder_norm=True, data_start=True, gate_l1=0.7, l0_weight=2.0)
    cfgs = {c.architecture: c for c in replace(base, architectures=names, train=options).train_configs()}
    plain = TrainConfig()
    assert [cfgs[name].k for name in names] == [32, None, None, 32, 32]
    assert [name for name in names if cfgs[name].multi_topk] == ["topk"]
    assert [name for name in names if cfgs[name].l1_decoder_norm] == ["relu"]
    assert [name for name in names if cfgs[name].data_start] == ["relu"]
    assert [name for name in names if cfgs[name].gate_l1 != plain.gate_l1] == ["gated"]
    assert [name for name in names if cfgs[name].l0_weight != plain.l0_weight] == ["jumprelu"]
    assert {c.train_tokens for c in cfgs.values()} == {base.train.train_tokens}


def test_quick_starts_its_relu_sae_at_tokens_and_topk_at_random() -> None:
    starts = {c.architecture: (c.data_start, c.train_tokens) for c in quick().train_configs()}
    assert starts == {"topk": (False, 999_424), "relu": (True, 999_424)}
