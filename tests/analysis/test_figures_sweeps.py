"""Panels over what was varied: where levels stand, what lines go through, what is marked and what is said."""

import numpy as np
import pandas as pd
import pytest

from analysis.drawing.canvas import new_figure
from analysis.drawing.level_axis import level_axis, level_text
from analysis.drawing.palette import ARMS
from analysis.drawing.sweep_panel import draw_reference, plot_levels
from analysis.figures.extrapolation import plot_extrapolation
from analysis.figures.levels import draw_levels
from analysis.figures.lr_sensitivity import draw_lr_sensitivity, plot_sensitivity, sensitivities
from analysis.figures.scaling import plot_scaling
from analysis.inference import t_interval
from muonlab.errors import MuonlabError


def lines(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


def legend(ax):
    return ax.get_legend_handles_labels()[1]


def runs(arm, values, status="finished"):
    """Rows of one arm: {level: [a value a seed]}."""
    return pd.DataFrame(
        {
            "arm": arm,
            "level": level,
            "seed": seed,
            "status": status,
            "val_loss": value,
            "end_max_logit": value,
        }
        for level, group in values.items()
        for seed, value in enumerate(group)
    )


class TestLevelAxis:
    @pytest.mark.parametrize("count", [2, 8, 14, len(ARMS)])
    def test_arms_beside_each_other_stay_within_the_axis(self, count):
        _, [[ax]] = new_figure(1, 1)
        both = {1.0: [2.0, 2.1], 8.0: [3.0, 3.1]}
        plot_levels(ax, pd.concat([runs(arm, both) for arm in [*ARMS][:count]]), "val_loss", "x")
        places = np.concatenate([line.get_xdata() for line in lines(ax, "seeds")])
        low, high = ax.get_xlim()
        assert low < places.min() < places.max() < high

    def test_numbers_are_placed_at_their_logarithm_and_names_to_the_right(self):
        axis = level_axis(pd.Series([0.01, 1.0, 0.1, "none"]))
        assert axis.places == pytest.approx({"0.01": -2, "0.1": -1, "1": 0, "none": 1})
        assert axis.joined == {"0.01", "0.1", "1"}

    def test_zero_has_no_logarithm_and_is_placed_one_step_to_the_left(self):
        axis = level_axis(pd.Series([0.0, 0.1, 10.0]))
        assert axis.places == pytest.approx({"0": -3, "0.1": -1, "10": 1})
        assert level_axis(pd.Series([0.0, 2.0]), log=False).places == {"0": 0, "2": 2}

    def test_names_alone_keep_their_order(self):
        axis = level_axis(pd.Series(["svd", "polar_express", "svd"]))
        assert axis.places == {"svd": 0, "polar express": 1}
        assert not axis.joined

    def test_numbers_that_were_read_as_text_are_numbers(self):
        assert level_axis(pd.Series(["0.125", "0.4"])).places.keys() == {"0.125", "0.4"}
        assert [level_text(x) for x in (1000.0, 0.003, "1500", "polar_express")] == [
            "1,000", "0.003", "1,500", "polar express",
        ]  # fmt: skip

    def test_long_texts_are_slanted_only_where_they_would_touch(self):
        for count, slanted in ((3, 0), (12, 45)):
            _, axes = new_figure()
            levels = pd.Series([1000.0 * (n + 1) for n in range(count)])
            level_axis(levels, log=False).draw(axes[0, 0], "x")
            assert {text.get_rotation() for text in axes[0, 0].get_xticklabels()} == {slanted}

    @pytest.mark.parametrize(
        ("rates", "texts"),
        [
            ([0.000123456, 0.0123456789, 0.3], ["1e-4", "1e-3", "1e-2", "1e-1"]),
            ([0.0123456789, 0.0523456789], ["2e-2", "5e-2"]),
            ([0.0223456789, 0.0242345678], ["2.25e-2", "2.3e-2", "2.35e-2", "2.4e-2"]),
        ],
    )
    def test_rates_that_a_sampler_drew_have_ticks_at_decades_or_round_values(self, rates, texts):
        _, axes = new_figure()
        level_axis(pd.Series(rates)).draw(axes[0, 0], "learning rate")
        labels = axes[0, 0].get_xticklabels()
        assert [text.get_text() for text in labels] == texts
        assert 10 ** axes[0, 0].get_xticks() == pytest.approx([float(text) for text in texts])
        assert not any(text.get_text() for text in axes[0, 0].get_xticklabels(minor=True))
        assert {text.get_rotation() for text in labels} == {0}

    def test_rates_that_somebody_chose_are_ticks_themselves(self):
        _, axes = new_figure()
        level_axis(pd.Series([0.001, 0.0032, 0.0125, 1536.0])).draw(axes[0, 0], "x")
        assert [t.get_text() for t in axes[0, 0].get_xticklabels()] == ["0.001", "0.0032", "0.0125", "1,536"]


class TestLevels:
    def test_the_line_goes_through_medians_and_few_seeds_are_points(self):
        _, axes = new_figure()
        plot_levels(axes[0, 0], runs("muon", {0.1: [2.0, 2.1, 2.6], 1.0: [1.9, 1.8, 1.7]}))
        (line,) = lines(axes[0, 0], "medians")
        assert line.get_xdata().tolist() == [-1, 0]
        assert line.get_ydata().tolist() == [2.1, 1.8]
        points = lines(axes[0, 0], "seeds")
        assert sorted(points[0].get_ydata()) == [2.0, 2.1, 2.6]
        assert legend(axes[0, 0]) == ["Muon: 1.800 at 1, edge"]

    def test_the_best_rate_is_written_with_three_digits(self):
        _, axes = new_figure()
        rates = {0.00123456789: [2.0], 0.0123456789: [1.9], 0.123456789: [2.0]}
        plot_levels(axes[0, 0], runs("muon", rates))
        assert legend(axes[0, 0]) == ["Muon: 1.900 at 0.0123"]

    def test_many_seeds_are_the_interval_of_their_mean(self):
        _, axes = new_figure()
        seeds = [2.0, 2.1, 2.2, 2.4, 2.3]
        plot_levels(axes[0, 0], runs("muon", {0.1: seeds, 1.0: seeds}))
        expected = t_interval(seeds)
        assert not lines(axes[0, 0], "seeds")
        assert lines(axes[0, 0], "interval")[0].get_ydata() == pytest.approx([expected.low, expected.high])
        low, high = axes[0, 0].get_ylim()
        assert low < expected.low
        assert high > expected.high

    def test_a_diverged_seed_is_the_worst_and_a_cross_at_the_top(self):
        frame = pd.concat(
            [runs("adamw", {0.1: [2.0, 2.2], 1.0: [2.1, 2.3]}), runs("adamw", {1.0: [np.nan]}, "diverged")]
        )
        _, axes = new_figure()
        ax = axes[0, 0]
        plot_levels(ax, frame)
        assert lines(ax, "medians")[0].get_ydata().tolist() == [2.1, 2.3], (
            "the median of 2.1, 2.3 and infinity"
        )
        (cross,), (ceiling,) = lines(ax, "diverged"), lines(ax, "ceiling")
        assert cross.get_ydata()[0] == ceiling.get_ydata()[0] > 2.3
        assert ax.texts[0].get_text() == "diverged"
        assert legend(ax) == ["AdamW: 2.100 at 0.1, edge (1 of 5 diverged)"]

    def test_what_was_never_reached_is_open_at_the_top(self):
        _, axes = new_figure()
        plot_levels(axes[0, 0], runs("muon", {1.0: [2.0], 10.0: [np.inf], 100.0: [3.0]}))
        (mark,) = lines(axes[0, 0], "censored")
        assert mark.get_markerfacecolor() == "white"
        assert mark.get_ydata()[0] > 3
        assert axes[0, 0].texts[0].get_text() == "never reached"

    def test_a_cut_axis_shows_the_basin_and_says_so(self):
        frame = runs("muon", {0.01: [2.1], 0.1: [2.0], 1.0: [2.05], 10.0: [2.1], 100.0: [40.0]})
        _, axes = new_figure()
        ax = axes[0, 0]
        plot_levels(ax, frame, cut=True)
        assert ax.get_ylim()[1] < 2.3
        assert lines(ax, "medians")[0].get_ydata().max() == lines(ax, "ceiling")[0].get_ydata()[0]
        assert ax.texts[0].get_text() == "worse than this"
        (ring,) = lines(ax, "optimum")
        assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (-1, 2.0)
        assert legend(ax) == ["Muon: 2.000 at 0.1"], "inside the range, so no edge"

    def test_an_arm_that_varies_nothing_is_a_line_across(self):
        frame = pd.concat(
            [runs("muon", {np.nan: [2.0, 2.2, 2.1]}), runs("muonclip", {3.0: [1.9], 30.0: [1.8]})]
        )
        _, axes = new_figure()
        plot_levels(axes[0, 0], frame, best=False)
        (fixed,) = lines(axes[0, 0], "fixed")
        assert set(fixed.get_ydata()) == {2.1}
        assert legend(axes[0, 0]) == ["Muon", "MuonClip"]

    def test_names_are_not_joined_by_a_line(self):
        _, axes = new_figure()
        plot_levels(axes[0, 0], runs("muon", {"svd": [2.0], "deepseek": [1.9]}))
        assert len(lines(axes[0, 0], "medians")[0].get_xdata()) == 0
        assert legend(axes[0, 0]) == ["Muon: 1.900 at deepseek"], "a name has no edge"

    def test_logits_have_a_logarithmic_axis_and_losses_a_linear_one(self):
        _, axes = new_figure(1, 2)
        frame = runs("muon", {1.0: [3.0], 10.0: [3000.0]})
        for ax, metric in zip(axes[0], ("end_max_logit", "val_loss"), strict=True):
            plot_levels(ax, frame, metric)
        assert [ax.get_yscale() for ax in axes[0]] == ["log", "linear"]

    def test_a_reference_outside_the_axis_widens_it(self):
        _, axes = new_figure()
        plot_levels(axes[0, 0], runs("muon", {1.0: [2.0], 10.0: [2.1]}))
        draw_reference(axes[0, 0], 5.5, "uniform guess")
        assert axes[0, 0].get_ylim()[1] > 5.5
        assert axes[0, 0].texts[-1].get_text() == "uniform guess"

    def test_nothing_finished_is_reported(self):
        _, axes = new_figure()
        with pytest.raises(MuonlabError, match="no run finished"):
            plot_levels(axes[0, 0], runs("muon", {1.0: [np.nan]}, "diverged"))


class TestWholeLevels:
    def test_measures_of_traces_are_columns_too(self, make_frames):
        step = np.arange(60)
        cells = [
            {"level": level, "seed": s, "steps": {"sigma_max/mlp": level * step}}
            for level in (1.0, 4.0)
            for s in (1, 2)
        ]
        fig, table, _ = draw_levels(make_frames(cells), [{"name": "peak", "column": "sigma_max/mlp"}])
        assert table.groupby("level")["sigma_max/mlp (peak)"].first().to_dict() == {1.0: 59.0, 4.0: 236.0}
        assert fig.axes[0].get_ylabel() == "largest singular value"

    def test_a_condition_that_varies_nothing_is_a_line_with_its_name_in_every_panel(self, make_frames):
        cells = [{"condition": "forced", "arm": "adamw", "level": k, "loss": k} for k in (2.0, 3.0)]
        cells += [{"condition": "free", "arm": "adamw", "loss": 1.9}]
        fig, _, _ = draw_levels(make_frames(cells), x="kappa")
        assert len(fig.axes) == 1
        assert legend(fig.axes[0]) == ["AdamW", "AdamW, free"]
        assert lines(fig.axes[0], "fixed")[0].get_ydata()[0] == 1.9

    def test_conditions_are_drawn_side_by_side_each_with_its_own_axis(self, make_frames):
        cells = [{"condition": "steps", "level": k, "loss": 2.0} for k in (1.0, 5.0)]
        cells += [{"condition": "schedules", "level": k, "loss": 2.1} for k in ("svd", "you")]
        fig, _, _ = draw_levels(make_frames(cells), x={"steps": "iterations", "schedules": "schedule"})
        assert [ax.get_xlabel() for ax in fig.axes] == ["iterations", "schedule"]
        assert [ax.get_title(loc="left") for ax in fig.axes] == ["steps", "schedules"]


class TestSensitivity:
    def test_it_is_the_mean_excess_over_the_best_rate_of_each_seed(self):
        frame = pd.DataFrame(
            {"condition": "d16", "arm": "muon", "seed": 1, "lr": [0.1, 1.0, 0.01], "loss": [2, 5.5, 3]}
        )
        once = pd.DataFrame({"condition": "d16", "arm": "adamw", "seed": 1, "lr": [0.1], "loss": [2.0]})
        found = sensitivities(pd.concat([frame, once]))
        assert found["arm"].tolist() == ["muon"], "an arm with one rate has none"
        assert found["sensitivity"].iloc[0] == pytest.approx((0 + 3.5 + 1) / 3)

    def test_seeds_are_points_on_a_logarithmic_axis(self):
        frame = pd.DataFrame(
            {"condition": c, "arm": "muon", "seed": s, "sensitivity": 0.1 * s * (2 if c == "d32" else 1)}
            for c in ("d16", "d32")
            for s in (1, 2)
        )
        _, axes = new_figure()
        plot_sensitivity(axes[0, 0], frame)
        assert axes[0, 0].lines[0].get_ydata() == pytest.approx([0.15, 0.3])
        assert axes[0, 0].get_yscale() == "log"
        assert [text.get_text() for text in axes[0, 0].get_xticklabels()] == ["d16", "d32"]

    def test_one_rate_per_arm_and_condition_is_one_panel(self, make_frames):
        cells = [{"condition": c, "lr": lr, "loss": 2 + lr} for c, lr in (("mild", 0.01), ("raised", 0.1))]
        fig, _, _ = draw_lr_sensitivity(make_frames(cells))
        assert len(fig.axes) == 1
        assert fig.axes[0].get_xlabel() == "peak learning rate"


class TestScaling:
    def test_the_arrow_is_as_long_as_the_laws_say(self):
        compute = np.array([1e9, 1e10, 1e11])
        law = {"adamw": 8.0, "muon": 7.6}
        frame = pd.DataFrame(
            {"arm": arm, "level": c, "seed": s, "flops": c, "loss": a * c**-0.05 * (1 + s / 1e9)}
            for arm, a in law.items()
            for c in compute
            for s in (1, 2, 3)
        )
        _, axes = new_figure()
        ax = axes[0, 0]
        plot_scaling(ax, frame, "muon", "adamw")
        share = (law["muon"] / law["adamw"]) ** (1 / 0.05)
        (saving,) = [text for text in ax.texts if text.get_gid() == "saving"]
        assert saving.get_text() == f"Muon needs {share:.2f} of the compute\n[{share:.2f}, {share:.2f}]"
        (arrow,) = [text for text in ax.texts if not text.get_text()]
        assert arrow.xy[0] / arrow.xyann[0] == pytest.approx(share, rel=1e-6)
        assert legend(ax) == ["AdamW: 8 $C^{-0.050}$", "Muon: 7.6 $C^{-0.050}$"]
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")

    def test_an_arm_without_runs_is_reported(self):
        _, axes = new_figure()
        frame = runs("muon", {1.0: [2.0]}).assign(flops=1e9, loss=2.0)
        with pytest.raises(MuonlabError, match="no finished run of 'lion'"):
            plot_scaling(axes[0, 0], frame, "lion", "muon")


class TestExtrapolation:
    def test_the_ring_is_the_prediction_and_the_legend_how_far_it_is_off(self):
        sizes = [16.0, 32.0, 64.0, 128.0]
        values = dict(zip(sizes, ([3.0 * size**1.5] for size in sizes), strict=True))
        values[128.0] = [2.0 * values[128.0][0]]
        _, axes = new_figure()
        plot_extrapolation(axes[0, 0], runs("muon", values))
        (ring,) = lines(axes[0, 0], "predicted")
        assert ring.get_ydata()[0] == pytest.approx(3.0 * 128**1.5)
        assert legend(axes[0, 0]) == ["Muon: measured 2.00 x predicted"]
        (held,) = [patch for patch in axes[0, 0].patches if patch.get_gid() == "held out"]
        assert np.log10(64) < held.get_x() < np.log10(128)
