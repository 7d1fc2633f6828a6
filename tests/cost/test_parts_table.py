"""The page of all parts: up to date, and its numbers those of parts built and traced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.cli.main import run
from graft.cost import parts_table
from graft.cost.parts_table import (
    SEQ_LEN,
    Measured,
    Speed,
    at_common_shape,
    common_part,
    cost_at_common_shape,
    one_layer,
    part_variants,
    parts_markdown,
)
from graft.errors import ConfigError
from graft.model import build_model
from graft.part import tensors_of
from graft.token_mixers.attention_config import AttentionConfig
from graft.token_mixers.ode_config import OdeConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    measured = Measured.from_json((DOCS / "parts_measured.json").read_text())
    remedy = "run: graft parts --markdown --measured docs/parts_measured.json > docs/parts.md"
    assert (DOCS / "parts.md").read_text() == parts_markdown(measured), remedy


def test_every_part_has_a_row() -> None:
    page = parts_markdown()
    for _, tag, _ in part_variants():
        assert page.count(f"\n| `{tag}` |") == 1, tag
    assert "training" not in page


def test_closed_forms_of_attention() -> None:
    cost = cost_at_common_shape(common_part("token_mixer", "attention"))
    assert cost.parameters == 4 * 512**2
    assert cost.forward_flops_per_token == 2 * 4 * 512**2 + 4 * 512 * (SEQ_LEN + 1) / 2
    assert cost.state_bytes == 2 * 512 * SEQ_LEN * 4


@pytest.mark.parametrize("tag", ["gla", "retention"])
def test_costs_are_those_of_the_layer_built(tag: str) -> None:
    part = common_part("token_mixer", tag)
    cost = cost_at_common_shape(part)
    model = build_model(one_layer(part), 8192, seed=0)
    (branch,) = (branch for _, branch in next(model.blocks()).branches())
    assert cost.parameters == sum(p.numel() for p in branch.part.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.features(torch.zeros(1, SEQ_LEN, dtype=torch.long))
    assert cost.forward_flops_per_token == pytest.approx(counter.get_total_flops() / SEQ_LEN, rel=1e-9)
    state = model.init_state(1, SEQ_LEN).branches
    assert cost.state_bytes == sum(t.numel() * t.element_size() for t in tensors_of(state))


def test_a_memory_counts_the_bank_it_shares() -> None:
    part = common_part("memory", "memory_bank")
    cost, model = cost_at_common_shape(part), build_model(one_layer(part), 8192, seed=0, device="meta")
    bank = sum(p.numel() for p in model.shared.parameters())
    assert bank >= 4096 * 512  # a key or a value per slot
    outside = sum(
        p.numel() for n, p in model.named_parameters() if n.startswith(("embedding.", "final_norm.", "head."))
    )
    assert cost.parameters == model.num_parameters() - outside - 512  # the branch's norm
    assert cost.active_parameters < cost.parameters


def test_only_what_a_part_must_be_told_is_taken_from_its_preset() -> None:
    shown = AttentionConfig.model_validate(
        {"type": "attention", "num_heads": 3, "sliding_window": 4, "position": {"type": "alibi"}}
    )
    told = at_common_shape(shown).model_dump(exclude_unset=True)
    assert told == {"type": "attention", "num_heads": 8, "position": {"type": "alibi"}}
    # without its mixer, which no rule marks as required, an ode is none: so all that is set is kept, at common sizes
    ode = OdeConfig.model_validate({"type": "ode", "solver": "euler", "mixer": shown.model_dump(exclude_unset=True)})
    told = at_common_shape(ode).model_dump(exclude_unset=True)
    assert told["solver"] == "euler"
    assert told["mixer"] == {"type": "attention", "num_heads": 8, "position": {"type": "alibi"}}


def test_speeds_round_trip_and_gaps_show() -> None:
    measured = Measured("a machine.", {"token_mixer.attention": Speed(1234.5, 67.8)})
    assert Measured.from_json(measured.to_json()) == measured
    page = parts_markdown(measured)
    assert "| 1,234 | 68 |" in page
    assert page.count("| not measured | not measured |") == len(list(part_variants())) - 1


def test_a_variant_without_preset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_table, "preset_folders", list)
    with pytest.raises(ConfigError, match="no preset shows the token_mixer 'attention'"):
        parts_markdown()


def test_the_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["parts", "--markdown"]) == 0
    assert capsys.readouterr().out == parts_markdown()
    speeds = tmp_path / "speeds.json"
    speeds.write_text(Measured("here.", {}).to_json())
    assert run(["parts", "--markdown", "--measured", str(speeds)]) == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--measured", "speeds.json"], "--markdown"),
        (["attention", "--markdown"], "leave out the name"),
        (["--markdown", "--json"], "leave out the name"),
        (["--markdown", "--measured", "no such file"], "no speeds can be read"),
    ],
)
def test_flags_that_do_nothing_are_errors(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["parts", *arguments]) == 2
    assert problem in capsys.readouterr().err
