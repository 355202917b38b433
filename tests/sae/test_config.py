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


@pytest.mark.parametrize(
    "values",
    [{"d_sae": "64"}, {"d_sae": True}, {"d_sae": 64.5}, {"lr": "1e-3"}, {"architecture": 3}, {"k": [1]},
     {"input_norm": "layernorm"}],
)  # fmt: skip
def test_a_value_of_another_type_is_named(values: dict):
    with pytest.raises(ConfigError, match=rf"TrainConfig\.{next(iter(values))}: expected .*, got"):
        from_dict(TrainConfig, values)


def test_whole_numbers_serve_as_floats_and_null_where_it_is_allowed():
    assert from_dict(TrainConfig, {"lr": 1, "k": None, "architecture": "relu"}).lr == 1


def test_plugins_are_files():
    assert {"relu", "topk"} <= set(plugins.names("sae.architectures"))
    with pytest.raises(UnknownPlugin, match="did you mean 'topk'"):
        plugins.find("sae.architectures", "topkk")
    assert plugins.find("sae.architectures", "json:dumps")([1]) == "[1]"
    with pytest.raises(UnknownPlugin, match="nowhere"):
        plugins.find("sae.architectures", "nowhere:thing")
