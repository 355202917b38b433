"""Configurations are strict; plug-ins are found by file name."""

import pytest

from sae import plugins
from sae.config import SAEConfig, TokensConfig, TrainConfig, from_dict, to_dict
from sae.errors import ConfigError, UnknownPlugin


def test_round_trip():
    cfg = TrainConfig(architecture="relu", d_sae=16, k=None, l1=0.5)
    assert from_dict(TrainConfig, to_dict(cfg)) == cfg


def test_unknown_key_names_the_near_one():
    with pytest.raises(ConfigError, match="did you mean 'd_sae'"):
        from_dict(TrainConfig, {"d_saee": 3})


@pytest.mark.parametrize(
    "values", [{"d_sae": 0}, {"d_sae": 8, "k": 9}, {"lr": 0.0}, {"batch_tokens": 100, "train_tokens": 10}]
)
def test_nonsense_is_refused(values: dict):
    with pytest.raises(ConfigError):
        TrainConfig(**values)


def test_a_split_needs_a_row():
    with pytest.raises(ConfigError, match="test_tokens"):
        TokensConfig(context_tokens=64, test_tokens=63)


def test_missing_field_is_an_error():
    with pytest.raises(ConfigError, match="missing"):
        from_dict(SAEConfig, {"architecture": "topk"})


def test_plugins_are_files():
    assert plugins.names("sae.architectures") == ["relu", "topk"]
    with pytest.raises(UnknownPlugin, match="did you mean 'topk'"):
        plugins.find("sae.architectures", "topkk")
    assert plugins.find("sae.architectures", "json:dumps")([1]) == "[1]"
    with pytest.raises(UnknownPlugin, match="nowhere"):
        plugins.find("sae.architectures", "nowhere:thing")
