"""Panels that hold arms against one another over steps, in dots and in tables."""

import numpy as np
import pandas as pd
import pytest

from analysis.drawing.canvas import new_figure
from analysis.drawing.layout import clock_by_arm, line_per_level
from analysis.drawing.lines import binned
from analysis.drawing.palette import ARMS
from analysis.drawing.panels import plot_column
from analysis.figures.arms import plot_differences, plot_logit_dots
from analysis.figures.crossing import paired_differences, plot_crossing
from analysis.figures.heads import plot_heads
from analysis.figures.mechanism import plot_mechanism
from analysis.figures.rise_and_fall import draw_rise_and_fall
from analysis.figures.spectra import draw_spectra
from analysis.figures.spike_events import column_label, plot_spike_events
from analysis.figures.to_target import plot_to_target, spent_until
from analysis.figures.traces import draw_traces
from analysis.inference import t_interval
from muonlab.errors import MuonlabError


def lines(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


@pytest.fixture
def arms(make_frames):
    """Muon, MuonClip 0.1 lower in every seed but for noise, AdamW far above with one diverged seed of four."""
    offsets = {"muon": 0.0, "muonclip": -0.1, "adamw": 1.5}
    return make_frames(
        {
            "arm": arm,
            "seed": s,
            "loss": 2 + offset + 0.01 * s + 0.002 * s * (arm != "muon"),
            "logit": 10.0 * s,
        }
        | ({"status": "diverged"} if (arm, s) == ("adamw", 2) else {})
        for arm, offset in offsets.items()
        for s in (1, 2, 3, 4)
    )


def draw_differences(ax, runs):
    plot_differences(ax, runs, "muon", "loss", "", list(dict.fromkeys(runs["arm"])))


class TestDifferences:
    def test_means_and_intervals_are_those_of_the_pairs(self, arms):
        _, axes = new_figure()
        ax = axes[0, 0]
        draw_differences(ax, arms.runs)
        assert [text.get_text() for text in ax.get_yticklabels()] == ["Muon", "MuonClip", "AdamW"]
        mean = next(line for line in lines(ax, "mean") if line.get_ydata()[0] == 1)
        differences = -0.1 + 0.002 * np.array([1, 2, 3, 4])
        assert mean.get_xdata()[0] == pytest.approx(differences.mean())
        bar = next(line for line in ax.lines if line.get_alpha() == 0.45 and line.get_ydata()[0] == 1)
        expected = t_interval(differences)
        assert bar.get_xdata() == pytest.approx([expected.low, expected.high])

    def test_an_arm_far_worse_is_drawn_at_the_edge_with_its_mean_and_its_losses(self, arms):
        _, axes = new_figure()
        ax = axes[0, 0]
        draw_differences(ax, arms.runs)
        (edge,) = lines(ax, "beyond")
        assert edge.get_ydata()[0] == 2
        assert ax.get_xlim()[1] == edge.get_xdata()[0] < 1
        assert ax.texts[0].get_text() == "+2.00, 1 of 4 diverged"

    def test_no_seed_of_a_usual_arm_lies_outside(self, arms):
        runs = arms.runs[arms.runs["arm"] != "adamw"].copy()
        wide = (runs["arm"] == "muonclip") & (runs["seed"] == 4)
        runs.loc[wide, "loss"] += 0.6
        _, axes = new_figure()
        draw_differences(axes[0, 0], runs)
        assert not lines(axes[0, 0], "beyond")
        low, high = axes[0, 0].get_xlim()
        drawn = np.concatenate([line.get_xdata() for line in axes[0, 0].lines[1:]])
        assert low < drawn.min() < 0.5 < drawn.max() < high

    def test_the_band_of_a_row_is_its_own_noise_floor(self, arms):
        _, axes = new_figure()
        runs = arms.runs.assign(loss=arms.runs["loss"].where(arms.runs["arm"] != "adamw", arms.runs["seed"]))
        draw_differences(axes[0, 0], runs)
        bands = [patch for patch in axes[0, 0].patches if patch.get_gid() == "noise floor"]
        assert [band.get_y() + 0.5 for band in bands] == [1, 2], "the baseline's own row has none"
        seeds = np.array([1, 2, 3, 4])
        floor = np.sqrt((np.var(0.01 * seeds, ddof=1) + np.var(0.012 * seeds, ddof=1)) / 2)
        # AdamW's second seed diverged, which says nothing about luck.
        settled = np.sqrt((3 * np.var(0.01 * seeds, ddof=1) + 2 * np.var([1, 3, 4], ddof=1)) / 5)
        assert [band.get_width() for band in bands] == pytest.approx([2 * floor, 2 * settled])

    def test_logits_are_medians_and_diverged_arms_have_a_cross(self, arms):
        _, axes = new_figure()
        ax = axes[0, 0]
        plot_logit_dots(ax, arms.runs, 30.0, ["muon", "muonclip", "adamw"])
        medians = {line.get_ydata()[0]: line.get_xdata()[0] for line in lines(ax, "median")}
        assert medians == {0: 25, 1: 25, 2: 30}
        assert len(lines(ax, "diverged")) == 1
        assert ax.texts[0].get_text() == "τ = 30"


class TestCrossing:
    def test_differences_are_paired_by_step_and_seed(self, arms):
        steps = arms.steps[arms.steps["arm"] != "adamw"]
        found = paired_differences(steps, "muonclip", "muon", "probe_loss")
        assert found.columns.tolist() == [1, 2, 3, 4]
        assert found.loc[55].to_numpy() == pytest.approx(-0.1 + 0.002 * np.array([1, 2, 3, 4]))
        _, axes = new_figure(2, 1)
        plot_crossing(axes[:, 0], steps, "muon")
        (mean,) = lines(axes[1, 0], "mean")
        assert mean.get_ydata()[-1] == pytest.approx(-0.095)
        assert len(lines(axes[1, 0], "seed")) == 4
        assert axes[0, 0].get_xlim() == axes[1, 0].get_xlim()

    def test_on_the_clock_steps_become_products_with_learning_rate_and_decay(self, arms):
        steps = arms.steps[arms.steps["arm"] != "adamw"].assign(clock=0.01)
        _, axes = new_figure(2, 1)
        plot_crossing(axes[:, 0], steps, "muon")
        assert axes[1, 0].get_xlim() == pytest.approx((0, 0.6))
        assert lines(axes[1, 0], "mean")[0].get_xdata()[-1] == pytest.approx(0.55)
        assert axes[1, 0].get_xlabel() == "step x learning rate x weight decay"

    def test_arms_without_a_shared_seed_are_reported(self, arms):
        steps = arms.steps[arms.steps["arm"] == "muon"]
        _, axes = new_figure(2, 1)
        with pytest.raises(MuonlabError, match="no arm has a seed in common"):
            plot_crossing(axes[:, 0], steps, "muon")


class TestLines:
    def test_levels_and_conditions_become_names_only_where_there_are_several(self, make_frames):
        cells = [{"arm": "muon", "condition": "decay", "level": wd} for wd in (0.0, 0.125)]
        cells += [{"arm": "muon", "condition": "same_clock", "level": 0.5}, {"arm": "adamw", "level": 3.0}]
        frames = line_per_level(make_frames(cells), "weight decay")
        expected = ["muon weight decay 0 decay", "muon weight decay 0.125 decay", "muon same clock", "adamw"]
        for table in (frames.runs, frames.steps, frames.heads):
            assert list(dict.fromkeys(table["arm"])) == expected

    def test_the_clock_of_an_arm_without_decay_is_the_slowest_of_the_others(self):
        runs = pd.DataFrame({"arm": ["a", "b", "c"], "lr": [0.1, 0.1, 0.2], "weight_decay": [0.0, 0.1, 0.5]})
        assert clock_by_arm(runs).to_dict() == pytest.approx({"a": 0.01, "b": 0.01, "c": 0.1})

    def test_bins_hold_medians_of_consecutive_readings(self):
        trace = pd.Series(np.arange(300.0), index=np.arange(0, 600, 2))
        found = binned(trace, 100)
        assert len(found) == 100
        assert found.iloc[0] == 1.0
        assert found.index[0] == 2
        pd.testing.assert_series_equal(binned(trace.head(100), 100), trace.head(100))


class TestRamp:
    def test_the_rates_are_printed_above_where_the_schedule_reaches_them(self, make_frames):
        ramp = {"scheduled_lr": 0.001 * 1000 ** (np.arange(60) / 59)}
        frames = make_frames([{"arm": "muon", "seed": s, "steps": ramp} for s in (1, 2)])
        fig, _, _ = draw_traces(frames, rates=True)
        (above,) = fig.axes[0].child_axes
        texts = [text.get_text() for text in above.get_xticklabels()]
        assert texts == ["0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1"]
        assert above.get_xticks()[[0, 2, 4, 6]] == pytest.approx([0, 59 / 3, 118 / 3, 59])

    def test_rates_that_a_warm_up_crosses_at_once_do_not_touch(self, make_frames):
        ramp = np.concatenate([np.geomspace(1e-4, 0.02, 6), np.geomspace(0.021, 1, 54)])
        fig, _, _ = draw_traces(make_frames([{"steps": {"scheduled_lr": ramp}}]), rates=True)
        assert np.diff(fig.axes[0].child_axes[0].get_xticks()).min() > 0.08 * 59

    def test_losses_above_the_first_one_are_cut_off(self, make_frames):
        loss = np.where(np.arange(60) % 5 == 0, np.linspace(5.0, 2.0, 60), np.nan)
        loss[55] = 70.0
        fig, _, _ = draw_traces(make_frames([{"steps": {"probe_loss": loss}}]))
        assert 5 < fig.axes[0].get_ylim()[1] < 6

    def test_a_million_is_a_power(self, make_frames):
        trace = np.geomspace(1, 1e9, 60)
        fig, _, _ = draw_traces(make_frames([{"steps": {"max_logit": trace}}]))
        fig.canvas.draw()
        texts = [text.get_text() for text in fig.axes[1].get_yticklabels()]
        assert {"1,000", "$10^{6}$"} <= set(texts)


class TestTarget:
    def test_ratios_are_taken_seed_by_seed_and_censored_ones_are_marked(self):
        rows = [("adamw", s, "steps", 100.0, True) for s in (1, 2, 3)]
        rows += [
            ("muon", 1, "steps", 50.0, True),
            ("muon", 2, "steps", 80.0, True),
            ("muon", 3, "steps", 200.0, False),
        ]
        frame = pd.DataFrame(rows, columns=["arm", "seed", "clock", "spent", "reached"])
        _, axes = new_figure()
        ax = axes[0, 0]
        plot_to_target(ax, frame, "adamw")
        (seeds,) = lines(ax, "seeds")
        assert seeds.get_xdata() == pytest.approx([0.5, 0.8])
        (censored,) = lines(ax, "censored")
        assert (censored.get_marker(), censored.get_xdata().tolist()) == (">", pytest.approx([2.0]))
        mean = np.exp(np.log([0.5, 0.8, 2.0]).mean())
        assert ax.texts[0].get_text().startswith(f"{mean:.2f} [")

    def test_a_run_that_never_arrives_has_spent_everything(self, arms):
        spent = spent_until(arms, 2.05)
        steps = spent[spent["clock"] == "steps"].set_index(["arm", "seed"])
        assert not steps.loc[("adamw", 1), "reached"]
        assert steps.loc[("adamw", 1), "spent"] == 59
        # 1.902 + 0.01 + 3 exp(-t / 6) reaches 2.05 near t = 18, between the readings at 15 and 20.
        assert 15 < steps.loc[("muonclip", 1), "spent"] < 20
        assert set(spent["clock"]) == {"steps", "tokens", "flops", "seconds"}


class TestTables:
    def test_cells_say_the_mean_score_and_where_a_seed_diverged(self):
        frame = pd.DataFrame(
            {"condition": ["base", "base", "deep"], "status": ["finished", "diverged", "finished"]}
            | {"spikes/olmo2/grad_norm": [0.0, 1.0, 0.0], "spikes/zclip/grad_norm": [0.001, 0.001, np.nan]}
        )
        _, axes = new_figure()
        columns = ["spikes/olmo2/grad_norm", "spikes/zclip/grad_norm"]
        plot_spike_events(axes[0, 0], frame, ["base", "deep", "bf16"], columns, 1.0)
        assert [text.get_text() for text in axes[0, 0].texts] == ["0.5†", "<.01†", "0"]
        assert [column_label(name) for name in columns] == ["OLMo 2: grad", "ZClip: grad"]


class TestColumns:
    def test_a_family_is_a_panel_a_member_or_one_for_all(self, make_frames):
        recorded = {"svd_entropy/query": 0.8, "svd_entropy/key": 0.6}
        frames = make_frames([{"arm": "muon", "seed": s, "steps": recorded} for s in (1, 2)])
        fig, _, _ = draw_spectra(frames)
        assert [ax.get_title(loc="left") for ax in fig.axes] == ["Query", "Key"]
        fig, table, _ = draw_spectra(frames, over="mean")
        assert len(fig.axes) == 1
        assert table["svd_entropy"].unique() == pytest.approx([0.7])

    @pytest.mark.parametrize(("shift", "shared"), [(0.1, True), (5.0, False)])
    def test_members_share_an_axis_where_none_is_flattened_by_it(self, shift, shared, make_frames):
        rise = np.linspace(0, 1, 60)
        recorded = {"svd_entropy/query": rise, "svd_entropy/key": rise + shift}
        fig, _, _ = draw_spectra(make_frames([{"arm": "muon", "steps": recorded}]))
        assert (fig.axes[0].get_ylim() == fig.axes[1].get_ylim()) is shared

    def test_clip_activity_is_drawn_only_where_a_clip_acted(self, make_frames):
        for arm, panels in (("muon", 3), ("muonclip", 4)):
            fig, _, _ = draw_rise_and_fall(make_frames([{"arm": arm, "logit": 100.0}]))
            assert len(fig.axes) == panels
        (line,) = fig.axes[3].lines
        assert line.get_ydata()[0] == 0
        assert line.get_ydata()[-1] == 1
        assert line.get_ydata()[43:45].tolist() == [12 / 25, 13 / 25], "the first step above tau is 44"

    def test_a_logarithmic_column_leaves_out_what_is_not_positive(self, make_frames):
        steps = make_frames([{"arm": "muon"}]).steps.assign(**{"sigma_max/mlp": np.linspace(-1, 5, 60)})
        _, axes = new_figure()
        plot_column(axes[0, 0], steps, "sigma_max/mlp")
        assert axes[0, 0].get_yscale() == "log"
        assert axes[0, 0].lines[0].get_ydata().min() > 0


class TestMechanism:
    def test_the_parts_add_up_to_the_growth_of_the_logit(self, make_frames):
        share = np.arange(60) / 59
        parts = {"argmax_query_norm": 10**share, "argmax_key_norm": 100**share, "argmax_cosine": 0.1**share}
        steps = make_frames([{"arm": "muon", "seed": s, "steps": parts} for s in (1, 2)]).steps
        _, axes = new_figure()
        plot_mechanism(axes[0, 0], steps)
        total = next(line for line in axes[0, 0].lines if line.get_label() == "max logit")
        first = 5 / 59  # warm-up ends at step 5
        assert total.get_ydata()[-1] == pytest.approx((1 + 2 - 1) * (1 - first))
        assert axes[0, 0].get_ylim()[0] < -(1 - first), "the cosine shrinks below zero"


class TestHeads:
    def test_one_line_per_head_and_the_line_at_tau(self, make_frames):
        heads = make_frames([{"arm": "muon"}]).heads
        _, axes = new_figure()
        plot_heads(axes[0, 0], heads, 30.0, (1.0, 200.0))
        first, second = lines(axes[0, 0], "head")
        assert first.get_color() == ARMS["muon"].colour != second.get_color()
        assert second.get_ydata() == pytest.approx(first.get_ydata() / 2)
        assert lines(axes[0, 0], "tau")
        assert axes[0, 0].get_title(loc="left") == "Muon"
