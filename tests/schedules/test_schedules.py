"""Golden values, end points and monotony of every schedule."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.schedules.base import Schedule
from graft.schedules.base_config import WarmupScheduleConfig
from graft.schedules.constant_config import ConstantScheduleConfig
from graft.schedules.cosine_config import CosineScheduleConfig
from graft.schedules.linear_config import LinearScheduleConfig
from graft.schedules.wsd_config import WsdScheduleConfig


def factors(config: WarmupScheduleConfig, max_steps: int, tokens_per_step: int = 1) -> list[float]:
    schedule: Schedule = config.build(max_steps=max_steps, tokens_per_step=tokens_per_step)
    return [schedule.factor(step) for step in range(max_steps)]


GOLDEN = [
    (ConstantScheduleConfig(warmup_steps=2), [0.5, 1, 1, 1, 1, 1]),
    (ConstantScheduleConfig(), [1, 1, 1, 1, 1, 1]),
    (LinearScheduleConfig(warmup_steps=2, min_lr_ratio=0.2), [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
    (LinearScheduleConfig(min_lr_ratio=0.0), [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
    # cos(π/4) = 1/√2: the third of four decay steps is at (1 - 1/√2)/2 above the floor
    (
        CosineScheduleConfig(warmup_steps=2, min_lr_ratio=0.2),
        [0.5, 1, 0.6 + 0.4 / math.sqrt(2), 0.6, 0.6 - 0.4 / math.sqrt(2), 0.2],
    ),
    # decay_start = 2 + 0.5 · 4 = 4, so the decay has two updates, at progress 1/2 and 1
    (WsdScheduleConfig(warmup_steps=2, decay_frac=0.5, decay_shape="linear", min_lr_ratio=0.0), [0.5, 1, 1, 1, 0.5, 0]),
    (
        WsdScheduleConfig(warmup_steps=2, decay_frac=0.5, decay_shape="one_minus_sqrt", min_lr_ratio=0.1),
        [0.5, 1, 1, 1, 0.1 + 0.9 * (1 - math.sqrt(0.5)), 0.1],
    ),
    (
        WsdScheduleConfig(warmup_steps=2, decay_frac=1.0, decay_shape="cosine", min_lr_ratio=0.2),
        [0.5, 1, 0.6 + 0.4 / math.sqrt(2), 0.6, 0.6 - 0.4 / math.sqrt(2), 0.2],
    ),
    (WsdScheduleConfig(warmup_steps=2, decay_frac=0.0), [0.5, 1, 1, 1, 1, 1]),
    # decay_start = 5.4 is no whole step: only the last update lies beyond it, and it is at the floor
    (WsdScheduleConfig(decay_frac=0.1, min_lr_ratio=0.3), [1, 1, 1, 1, 1, 0.3]),
    (WsdScheduleConfig(warmup_steps=6, decay_frac=0.5), [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
]


@pytest.mark.parametrize(("config", "golden"), GOLDEN)
def test_golden_values(config: WarmupScheduleConfig, golden: list[float]):
    assert factors(config, 6) == pytest.approx(golden, abs=1e-15)


@pytest.mark.parametrize(
    "fields", [{"warmup_steps": 4}, {"warmup_fraction": 0.4}, {"warmup_tokens": 260}], ids=lambda f: next(iter(f))
)
def test_warmup_in_steps_fraction_and_tokens_agree(fields: dict[str, float]):
    config = LinearScheduleConfig.model_validate({"type": "linear", **fields})
    assert factors(config, 10, tokens_per_step=64) == factors(LinearScheduleConfig(warmup_steps=4), 10)
    assert factors(config, 10, tokens_per_step=64)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("config", [c for c, _ in GOLDEN])
def test_the_factor_stays_after_the_run(config: WarmupScheduleConfig):
    schedule = config.build(max_steps=6, tokens_per_step=1)
    assert schedule.factor(6) == schedule.factor(1000) == schedule.factor(5)


def test_factor_is_pure():
    schedule = CosineScheduleConfig(warmup_steps=3).build(max_steps=20, tokens_per_step=1)
    forward = [schedule.factor(s) for s in range(20)]
    assert [schedule.factor(s) for s in reversed(range(20))] == forward[::-1]


floors = st.floats(0.0, 1.0)
shapes = st.sampled_from(["linear", "cosine", "one_minus_sqrt"])
decaying = st.one_of(
    st.builds(lambda r: LinearScheduleConfig(min_lr_ratio=r), floors),
    st.builds(lambda r: CosineScheduleConfig(min_lr_ratio=r), floors),
    st.builds(
        lambda r, f, s: WsdScheduleConfig(min_lr_ratio=r, decay_frac=f, decay_shape=s),
        floors,
        st.floats(1e-3, 1.0),
        shapes,
    ),
)


@given(config=decaying, max_steps=st.integers(1, 300), share=st.floats(0.0, 1.0))
def test_rises_to_the_peak_then_falls_to_the_floor(config, max_steps: int, share: float):
    warmup = int(share * max_steps)
    values = factors(config.replace(warmup_steps=warmup), max_steps)
    floor = config.min_lr_ratio if warmup < max_steps else 1.0
    rising, falling = values[:warmup], values[warmup:]
    assert rising == [(i + 1) / warmup for i in range(warmup)]
    assert values[-1] == floor
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(falling))
    assert all(floor - 1e-15 <= v <= 1.0 + 1e-15 for v in falling)


@given(max_steps=st.integers(2, 200), frac=st.floats(0.0, 1.0), warmup=st.integers(0, 100), shape=shapes)
def test_wsd_is_at_the_peak_exactly_until_decay_start(max_steps: int, frac: float, warmup: int, shape):
    warmup = min(warmup, max_steps)
    values = factors(WsdScheduleConfig(warmup_steps=warmup, decay_frac=frac, decay_shape=shape), max_steps)
    decay_start = warmup + (1.0 - frac) * (max_steps - warmup)
    for step in range(warmup, max_steps):
        if step + 1 < decay_start - 1e-9:
            assert values[step] == 1.0
        elif step + 1 > decay_start + 1e-9 * max_steps:
            assert values[step] < 1.0
