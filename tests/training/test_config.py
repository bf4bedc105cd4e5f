"""Settings: presets, what wins over them, and what a mistake says."""

from __future__ import annotations

from typing import Any

import pytest

from outdraft.errors import UserError
from outdraft.training.config import DrafterConfig


def config(**values: Any) -> DrafterConfig:
    return DrafterConfig(**{"data": "d", "output_dir": "o", **values})


def test_every_setting_has_a_help_text() -> None:
    assert [name for name, field in DrafterConfig.model_fields.items() if not field.description] == []


def test_the_paper_preset_is_the_published_recipe() -> None:
    paper = config(preset="paper").with_preset(10**6)
    assert (paper.learning_rate, paper.warmup_steps, paper.lr_schedule) == (5e-5, 2000, "linear")
    assert (paper.beta1, paper.beta2, paper.clip_value, paper.precision) == (0.9, 0.95, 0.5, "bf16")
    assert (paper.max_length, paper.batch_size, paper.epochs, paper.max_steps) == (2048, 16, 20, None)
    assert (paper.w_reg, paper.w_cls, paper.feature_noise) == (1.0, 0.1, True)
    assert (paper.unroll_steps, paper.token_loss, paper.w_reg_schedule) == (1, "soft", "constant")
    assert paper.teacher_top_k == 0  # the target's whole distribution
    assert (paper.tap_layers, paper.state_norm, paper.intermediate_size) == (None, False, None)
    assert (paper.feature_sampling, paper.partial_alignment, paper.method) == (None, None, "fspad")  # by the method: on
    assert paper.warmup_for(100) == 2000
    assert config(preset="paper", method="eagle").with_preset(10**6).learning_rate == 3e-5


@pytest.mark.parametrize(("size", "name"), [(10**6, "tiny"), (3 * 10**8, "small"), (7 * 10**9, "base")])
def test_auto_chooses_by_the_targets_size(size: int, name: str) -> None:
    assert config().with_preset(size).preset == name


def test_small_targets_get_a_larger_rate_and_a_cosine() -> None:
    tiny, base = (config().with_preset(size) for size in (10**6, 7 * 10**9))
    assert tiny.learning_rate > 10 * base.learning_rate
    assert (tiny.lr_schedule, base.lr_schedule) == ("cosine", "linear")


def test_what_is_set_by_hand_wins_over_the_preset() -> None:
    by_hand = config(learning_rate=7e-4, max_steps=100, warmup_steps=50).with_preset(10**6)
    assert (by_hand.learning_rate, by_hand.max_steps, by_hand.warmup_for(100)) == (7e-4, 100, 50)
    assert config(max_steps=100).with_preset(10**6).warmup_for(100) == 10
    assert config(epochs=3).with_preset(10**6).max_steps is None
    assert config(epochs=3).with_preset(10**6).epochs == 3


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rat": 1}, "unknown training setting \"learning_rat\"; did you mean 'learning_rate'?"),
        ({"zzz": 1}, 'unknown training setting "zzz"; known are data, output_dir'),
        ({"learning_rate": -1}, '"learning_rate" cannot be -1'),
        ({"method": "hydra"}, "\"method\" cannot be 'hydra'"),
        ({"output_dir": None}, '"output_dir" cannot be None'),
        ({"teacher_top_k": -1}, '"teacher_top_k" cannot be -1'),
        ({"patience": -1}, '"patience" cannot be -1'),
        ({"features": "never"}, "\"features\" cannot be 'never'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as raised:
        config(**values)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_is_measured_ten_times_unless_said_otherwise() -> None:
    assert [config().evaluation_for(steps) for steps in (5, 11, 400, 5000, 20_000)] == [1, 1, 40, 500, 500]
    assert [config(eval_steps=7).evaluation_for(steps) for steps in (5, 400)] == [7, 7]
    assert config(eval_steps=500).with_preset(10**6).evaluation_for(40) == 500


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"features": "online"},
        {"teacher_top_k": 0, "patience": 3},
        {"token_loss": "top-k", "token_top_k": 5},
        {"method": "eesd", "exit_layer": 1},
        {"w_reg": 0},
    ],
)
def test_a_record_is_a_configuration_again(values: dict[str, Any]) -> None:
    settled = config(**values).with_preset(10**6)
    assert DrafterConfig(**settled.record()).record() == settled.record()


@pytest.mark.parametrize("name", ["token_top_k", "token_top_k_weight"])
def test_settings_of_the_top_k_loss_are_refused_without_it(name: str) -> None:
    assert getattr(config(**{"token_loss": "top-k", name: 3}), name) == 3
    with pytest.raises(
        UserError, match=f'"{name}" belongs to token_loss top-k, not soft; change token_loss or leave it out'
    ):
        config(**{name: 3})


@pytest.mark.parametrize(
    ("values", "choice", "says"),
    [
        ({"unroll_decay": 0.5}, {"unroll_steps": 2}, '"unroll_decay" belongs to unroll_steps of 2 or more, not 1'),
        ({"w_reg_schedule": "linear", "w_reg": 0}, {"w_reg": 0.1}, '"w_reg_schedule" belongs to w_reg above 0, not 0'),
        (
            {"feature_cache_dir": "f", "features": "online"},
            {"features": "cached"},
            '"feature_cache_dir" belongs to features cached or auto, not online',
        ),
        (
            {"feature_cache_gb": 1.5, "features": "online"},
            {"features": "auto"},
            '"feature_cache_gb" belongs to features cached or auto, not online',
        ),
    ],
)
@pytest.mark.parametrize("preset", ["auto", "paper"])
def test_settings_that_nothing_would_read_are_refused(
    values: dict[str, Any], choice: dict[str, Any], says: str, preset: str
) -> None:
    with pytest.raises(UserError) as raised:
        config(**values, preset=preset).with_preset(10**6)  # auto is a preset only once the target is known
    (setting,) = choice
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).endswith(f"; change {setting} or leave it out")
    kept = config(**values | choice, preset=preset).with_preset(10**6).record()
    assert all(str(kept[name]) == str(value) for name, value in (values | choice).items())


def test_what_a_preset_makes_a_setting_s_choice_is_taken_for_made() -> None:
    assert config(unroll_from=0.4).with_preset(135 * 10**6).unroll_from == 0.4
    assert config(unroll_from=0.4, preset="small").with_preset(10**6).unroll_steps == 3
    with pytest.raises(UserError, match='"unroll_from" belongs to unroll_steps of 2 or more, not 1'):
        config(unroll_from=0.4, preset="paper")
    with pytest.raises(UserError, match='"unroll_from" belongs to unroll_steps of 2 or more, not 1'):
        config(unroll_from=0.4, preset="small", unroll_steps=1)


@pytest.mark.parametrize("name", ["tap_layers", "state_norm", "token_loss", "w_reg_schedule", "unroll_decay"])
def test_what_goes_beyond_the_paper_is_fspad_s_and_eagle_s(name: str) -> None:
    value = {"tap_layers": "auto", "state_norm": True, "token_loss": "top-k", "w_reg_schedule": "linear"}.get(name, 0.5)
    with_what_it_needs = {"unroll_steps": 2, name: value}
    assert getattr(config(method="eagle", **with_what_it_needs), name) == value
    with pytest.raises(
        UserError, match=f'"{name}" is a setting of (dflash, dspark, )?(eagle3, )?fspad(, | and )eagle.*, not of medusa'
    ):
        config(method="medusa", **{name: value})


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(UserError, match=r'training needs "output_dir"; set it .* --output-dir'):
        DrafterConfig(data="d")
