"""Groups: a partition by role, overrides, the table, the learning rate."""

import pytest

from graft.config.roles import NO_DECAY
from graft.errors import ConfigError
from graft.optimizers.adamw_config import AdamWConfig
from graft.optimizers.groups import assert_partition, describe_groups, named_trainable, set_learning_rate
from graft.optimizers.groups_config import GroupedOptimizerConfig, RoleOverride
from graft.optimizers.muon_config import MuonConfig

BOTH = pytest.mark.parametrize("config_class", [AdamWConfig, MuonConfig])


def by_role(optimizer) -> dict[tuple[str, str], dict]:
    return {(g["algorithm"], g["role"]): g for g in optimizer.param_groups}


@BOTH
@pytest.mark.parametrize("tied", [False, True])
def test_groups_are_a_partition(tiny_model, config_class: type[GroupedOptimizerConfig], tied: bool):
    model = tiny_model(tied)
    optimizer = config_class(learning_rate=1e-3).build(model)
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    rows = describe_groups(optimizer)
    assert sum(r.num_parameters for r in rows) == sum(p.numel() for p in model.parameters())
    assert sum(r.num_tensors for r in rows) == len(grouped)


def test_partition_assertion_fails_on_missing_and_double_parameters(tiny_model):
    model = tiny_model()
    parameters = list(model.parameters())
    assert_partition([{"params": parameters}], model)
    with pytest.raises(AssertionError, match="not the model's"):
        assert_partition([{"params": parameters[1:]}], model)
    with pytest.raises(AssertionError, match="two optimizer groups"):
        assert_partition([{"params": parameters}, {"params": parameters[:1]}], model)


def test_every_parameter_is_in_the_group_of_its_role(tiny_model):
    model = tiny_model()
    groups = by_role(AdamWConfig(learning_rate=1e-3).build(model))
    assert [id(p) for p in groups["adamw", "attention"]["params"]] == [id(model.attention.q), id(model.attention.o)]
    assert [id(p) for p in groups["adamw", "bias"]["params"]] == [id(model.attention.bias)]
    assert [id(p) for p in groups["adamw", "scalar"]["params"]] == [id(model.attention.gain)]
    assert [id(p) for p in groups["adamw", "router"]["params"]] == [id(model.router.weight)]


def test_a_tied_head_is_embedding(tiny_model):
    groups = by_role(AdamWConfig(learning_rate=1e-3).build(tiny_model(tied=True)))
    assert ("adamw", "head") not in groups
    assert ("adamw", "embedding") in groups


def test_frozen_parameters_are_left_out(tiny_model):
    model = tiny_model()
    model.embedding.weight.requires_grad_(False)
    assert all(item.role != "embedding" for item in named_trainable(model))
    assert ("adamw", "embedding") not in by_role(AdamWConfig(learning_rate=1e-3).build(model))


@BOTH
def test_only_no_decay_roles_are_spared(tiny_model, config_class: type[GroupedOptimizerConfig]):
    optimizer = config_class(learning_rate=1e-3, weight_decay=0.3).build(tiny_model())
    decays = {g["role"]: g["weight_decay"] for g in optimizer.param_groups}
    assert decays == {role: 0.0 if role in NO_DECAY else 0.3 for role in decays}
    assert {"norm", "bias", "scalar", "memory_bank", "attention", "head"} <= decays.keys()


@BOTH
def test_overrides_reach_their_role_alone(tiny_model, config_class: type[GroupedOptimizerConfig]):
    override = RoleOverride(lr_multiplier=0.5, weight_decay=0.07, betas=(0.8, 0.88), eps=1e-5)
    config = config_class(learning_rate=1e-2, groups={"norm": override})
    for group in config.build(tiny_model()).param_groups:
        if group["role"] == "norm":
            assert (group["lr_multiplier"], group["lr"], group["weight_decay"]) == (0.5, 0.5e-2, 0.07)
            assert (group["betas"], group["eps"]) == ((0.8, 0.88), 1e-5)
        else:
            assert (group["lr_multiplier"], group["lr"]) == (1.0, 1e-2)
            assert group.get("betas", (0.9, 0.95)) == (0.9, 0.95)


@BOTH
def test_an_override_without_parameters_is_an_error(tiny_model, config_class: type[GroupedOptimizerConfig]):
    config = config_class(learning_rate=1e-3, groups={"head": RoleOverride(weight_decay=0.0)})
    config.build(tiny_model())
    with pytest.raises(ConfigError, match=r"optimizer\.groups\.head.*do nothing.*tied"):
        config.build(tiny_model(tied=True))


def test_override_betas_are_checked():
    with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
        RoleOverride(betas=(0.9, 1.0))


@BOTH
def test_learning_rate_is_peak_times_factor_times_multiplier(tiny_model, config_class: type[GroupedOptimizerConfig]):
    config = config_class(learning_rate=0.4, groups={"embedding": RoleOverride(lr_multiplier=0.25)})
    optimizer = config.build(tiny_model())
    for factor in (0.5, 0.125):  # from the peak every time, never from the last rate
        assert set_learning_rate(optimizer, factor) == 0.4 * factor
        rates = {g["role"]: g["lr"] for g in optimizer.param_groups}
        assert rates.pop("embedding") == 0.4 * factor * 0.25
        assert set(rates.values()) == {0.4 * factor}


def test_the_table_names_algorithm_and_settings(tiny_model):
    rows = {(r.algorithm, r.role): r for r in describe_groups(MuonConfig(learning_rate=1e-3).build(tiny_model()))}
    row = rows["muon", "mlp"]
    assert (row.num_tensors, row.num_parameters, row.lr_multiplier, row.weight_decay) == (3, 3 * 96, 1.0, 0.1)
    assert rows["adamw", "mlp"].num_parameters == 6
