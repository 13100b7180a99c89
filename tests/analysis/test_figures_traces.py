"""Figures over steps from small made-up runs: what they show and say, and that nothing lies on anything else."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from analysis.drawing.canvas import new_figure
from analysis.drawing.lines import centred_mean, median_trace
from analysis.drawing.palette import ARMS
from analysis.drawing.panels import plot_loss, plot_max_logit
from analysis.figures.spike_vs_stable import draw_spike_vs_stable, plot_spike_vs_stable
from analysis.figures.switch import plot_switch
from analysis.frames import collect
from analysis.run_tests import off_windows
from muonlab.errors import MuonlabError


def legend(ax):
    return ax.get_legend_handles_labels()[1]


def lines(ax, gid=None):
    return [line for line in ax.lines if line.get_gid() == gid]


def bold(ax, arm):
    """The line of the arm's median."""
    return next(line for line in ax.lines if line.get_label().startswith(ARMS[arm].label))


def assert_drawn(fig):
    """No axes without a line or a label, and no two texts on each other."""
    fig.canvas.draw()
    for ax in fig.axes:
        assert ax.lines
        assert ax.get_ylabel()
        placed = [text for text in ax.texts if text.get_text()]
        boxes = [artist.get_window_extent() for artist in placed]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i]), [text.get_text() for text in placed]


class TestLoss:
    def test_says_what_it_shows(self, frames):
        fig, axes = new_figure()
        ax = axes[0, 0]
        plot_loss(ax, frames.steps, title="A finding")
        assert_drawn(fig)
        assert legend(ax) == ["AdamW (n=2)", "Muon (n=2, 1 diverged)", "MuonClip (n=2)"]
        assert ax.get_ylabel() == "probe-batch loss\n(nats per token)"
        assert ax.get_xlabel() == "optimizer step (1,024 tokens each)"
        assert ax.get_title(loc="left") == "A finding"
        assert ax.get_xlim() == (0, 120)
        # Two seeds and a median for each of three arms.
        assert len(lines(ax)) == 9
        assert len(lines(ax, "diverged")) == 1

    def test_arms_have_their_colours_and_the_median_is_the_heaviest(self, frames):
        _, axes = new_figure()
        plot_loss(axes[0, 0], frames.steps)
        for arm in ("adamw", "muon", "muonclip"):
            assert to_hex(bold(axes[0, 0], arm).get_color()) == ARMS[arm].colour
        widths = [line.get_linewidth() for line in lines(axes[0, 0])]
        assert bold(axes[0, 0], "muon").get_linewidth() == max(widths) > 2 * min(widths)

    def test_smoothing_leaves_the_raw_trace_visible(self, frames):
        _, axes = new_figure()
        ax = axes[0, 0]
        plot_loss(ax, frames.steps, "train_loss", window=10)
        assert len([line for line in ax.lines if line.get_alpha() == 0.2]) == 6
        raw = frames.steps[frames.steps["run"] == "adamw-s1"]["train_loss"].to_numpy()
        drawn = next(line for line in ax.lines if line.get_alpha() == 0.45).get_ydata()
        assert drawn[50] == pytest.approx(raw[46:55].mean())
        assert drawn[3] == pytest.approx(raw[:7].mean())

    def test_the_axis_shows_the_region_where_the_arms_differ(self, frames):
        _, axes = new_figure()
        plot_loss(axes[0, 0], frames.steps)
        assert axes[0, 0].get_ylim()[1] < frames.steps["probe_loss"].max()

    def test_a_single_run_is_one_line(self, frames):
        _, axes = new_figure()
        plot_loss(axes[0, 0], frames.steps[frames.steps["run"] == "adamw-s1"])
        assert len(axes[0, 0].lines) == 1
        assert legend(axes[0, 0]) == ["AdamW (n=1)"]

    def test_a_frame_without_readings_or_columns_is_refused(self, frames):
        _, axes = new_figure()
        with pytest.raises(MuonlabError, match="nothing to draw: no finite 'probe_loss' in 6 runs"):
            plot_loss(axes[0, 0], frames.steps.assign(probe_loss=np.nan))
        with pytest.raises(MuonlabError, match="lacks the columns probe_loss, status"):
            plot_loss(axes[0, 0], frames.steps.drop(columns=["status", "probe_loss"]))


class TestTraces:
    def test_a_diverged_run_is_the_worst_from_its_end_on(self):
        traces = pd.DataFrame({"a": [1.0, 2, 3, 4], "b": [3.0, 4, 5, 6], "c": [2.0, 9, np.inf, np.nan]})
        assert median_trace(traces).tolist() == [2, 4, 5, 6]

    def test_a_run_that_stops_is_left_out_and_gaps_are_bridged(self):
        traces = pd.DataFrame({"a": [1.0, np.nan, 3.0, 4.0], "b": [3.0, 4.0, np.nan, np.nan]})
        assert median_trace(traces).tolist() == [2, 3, 3, 4]

    def test_when_most_runs_diverged_the_median_ends(self):
        traces = pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, np.inf], "c": [1.0, np.inf]})
        assert median_trace(traces).to_dict() == {0: 1.0}

    def test_the_centred_mean_counts_steps_not_readings(self):
        sparse = pd.Series([4.0, 2.0, 6.0], index=[0, 25, 50])
        assert centred_mean(sparse, 51).tolist() == [4, 4, 6]
        assert centred_mean(sparse, 50).tolist() == [4, 2, 6]
        assert centred_mean(sparse, 1).tolist() == [4, 2, 6]
        dense = pd.Series(np.random.default_rng(0).normal(size=50))
        middle = centred_mean(dense, 7).iloc[3:-3]
        pd.testing.assert_series_equal(middle, dense.rolling(7, center=True).mean().iloc[3:-3])

    @pytest.mark.parametrize("window", [2, 7, 25, 1000])
    def test_the_centred_mean_is_not_biased_by_a_trend_even_at_the_ends(self, window):
        falling = pd.Series(5 - 0.1 * np.arange(40))
        pd.testing.assert_series_equal(centred_mean(falling, window), falling)

    def test_the_centred_mean_of_a_falling_loss_does_not_lie_above_it(self):
        step = np.arange(100)
        loss = pd.Series(2 + 3 * np.exp(-step / 20) + 0.1 * (-1.0) ** step)
        assert (centred_mean(loss, 25) - loss).mean() < 0.03
        assert (loss.rolling(25, min_periods=1).mean() - loss).mean() > 0.2, "the mean of past readings does"


class TestMaxLogit:
    def test_log_axis_with_a_labelled_tau(self, frames):
        fig, axes = new_figure()
        ax = axes[0, 0]
        plot_max_logit(ax, frames.steps, tau=30.0)
        assert_drawn(fig)
        assert ax.get_yscale() == "log"
        assert ax.get_ylabel() == "max logit (scaled q·k)"
        (tau,) = lines(ax, "tau")
        assert set(tau.get_ydata()) == {30.0}
        assert tau.get_linestyle() == "--"
        assert [text.get_text() for text in ax.texts] == ["τ = 30"]
        assert {"3", "30", "300"} <= {label.get_text() for label in ax.get_yticklabels()}

    def test_without_a_clip_there_is_no_tau(self, frames):
        _, axes = new_figure()
        plot_max_logit(axes[0, 0], frames.steps)
        assert not lines(axes[0, 0], "tau")

    def test_every_positive_reading_lies_inside_the_axis(self, frames):
        _, axes = new_figure()
        steps = frames.steps.copy()
        steps.loc[steps["step"] == 0, "max_logit"] = -0.5
        plot_max_logit(axes[0, 0], steps, tau=30.0)
        low, high = axes[0, 0].get_ylim()
        assert 0 < low < steps.loc[steps["step"] == 5, "max_logit"].min()
        assert high > steps["max_logit"].max()


class TestSwitch:
    @pytest.fixture
    def steps(self, runs, make_run):
        named = {f"s{seed}": make_run("muonclip", seed, num_steps=200, off=(80, 140)) for seed in (1, 2)}
        return collect({"muonclip": runs(**named)}).steps

    def test_panels_share_steps_and_shade_where_the_clip_is_off(self, steps):
        fig, axes = new_figure(2, 1, height=3.2)
        top, bottom = axes[:, 0]
        plot_switch((top, bottom), steps, [(0, 80), (140, 200)], tau=30.0, title="Off and on")
        assert_drawn(fig)
        assert top.get_xlim() == bottom.get_xlim() == (0, 200)
        assert (top.get_xlabel(), bottom.get_xlabel()) == ("", "optimizer step (1,024 tokens each)")
        for ax in (top, bottom):
            (shade,) = [patch for patch in ax.patches if patch.get_gid() == "clip off"]
            assert (shade.get_x(), shade.get_x() + shade.get_width()) == (80, 140)
        words = [text.get_text() for text in bottom.texts if text.get_text().startswith("clip")]
        assert words == ["clip on", "clip off", "clip on"]

    @pytest.mark.parametrize(
        ("windows", "gaps"),
        [
            ([(0, 80), (140, 200)], [(80, 140)]),
            ([(50, 200)], [(0, 50)]),
            ([], [(0, 200)]),
            ([(0, 300)], []),
            ([(120, 150), (0, 60), (40, 80)], [(80, 120), (150, 200)]),
            ([(0, 80), (250, 300)], [(80, 200)]),
        ],
    )
    def test_off_is_what_the_windows_leave(self, windows, gaps):
        assert off_windows(windows, 200) == gaps


class TestSpikeVsStable:
    def test_three_panels_and_a_rug_of_spikes(self, frames):
        fig, axes = new_figure(3, 1, height=4.4)
        panels = axes[:, 0]
        steps = frames.steps[frames.steps["arm"] != "adamw"]
        plot_spike_vs_stable(panels, steps, tau=30.0, window=10)
        assert_drawn(fig)
        assert [ax.get_ylabel() for ax in panels] == [
            "training loss\n(nats per token)",
            "max logit (scaled q·k)",
            "gradient norm",
        ]
        assert [bool(ax.get_xlabel()) for ax in panels] == [False, False, True]
        (muon,), (clip,) = (lines(panels[0], f"rug {arm}") for arm in ("muon", "muonclip"))
        assert muon.get_xdata().tolist() == [60, 60]
        assert len(clip.get_xdata()) == 0
        assert panels[0].texts[0].get_text() == "7-sigma spikes: Muon 2, MuonClip 0"

    def test_without_a_spike_the_traces_have_the_whole_panel(self, frames):
        fig, axes = new_figure(3, 1, height=4.4)
        calm = frames.steps.assign(loss_spikes=0.0, grad_spikes=frames.steps["loss_spikes"])
        plot_spike_vs_stable(axes[:, 0], calm)
        _, alone_axes = new_figure(height=4.4)
        plot_loss(alone_axes[0, 0], calm, "train_loss", 25)
        assert axes[0, 0].get_ylim() == alone_axes[0, 0].get_ylim()
        assert not axes[0, 0].texts
        assert [text.get_text()[:9] for text in axes[2, 0].texts] == ["7-sigma s"]
        fig.canvas.draw()
        _, _, note = draw_spike_vs_stable(replace(frames, steps=calm))
        assert note.endswith("No 7-sigma spike of the loss.")
        assert (
            "No 7-sigma" not in draw_spike_vs_stable(replace(frames, steps=calm.assign(loss_spikes=1.0)))[2]
        )

    def test_the_rug_lies_below_the_traces_on_both_kinds_of_axis(self, frames):
        fig, axes = new_figure(3, 1, height=4.4)
        steps = frames.steps.assign(grad_spikes=frames.steps["loss_spikes"])
        plot_spike_vs_stable(axes[:, 0], steps, tau=30.0)
        fig.canvas.draw()
        for ax, column in ((axes[0, 0], "train_loss"), (axes[2, 0], "grad_norm")):
            (rug,) = lines(ax, "rug muon")
            low, high = ax.get_ylim()
            assert low < rug.get_ydata()[0] < steps[column].quantile(0.01)
            assert high > steps[column].quantile(0.9)
            assert min(ax.get_yticks()) > rug.get_ydata()[0]
