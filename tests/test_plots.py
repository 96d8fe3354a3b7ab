"""The curves of a config's noise levels against the closed forms of their densities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffusion_jax import builders, plots
from diffusion_jax import config as configs

GAUSSIAN, TRAINING = "process.gaussian.", "objective.denoising."
EDM = {
    f"{GAUSSIAN}schedule.name": "edm",
    f"{GAUSSIAN}prediction": "edm",
    f"{TRAINING}time.name": "log_normal",
    f"{TRAINING}weighting.name": "edm",
    "network.noise_input": "c_noise",
}
FLOW = {
    f"{GAUSSIAN}schedule.name": "rectified_flow",
    f"{GAUSSIAN}prediction": "velocity",
    f"{TRAINING}time.name": "logit_normal",
    "network.noise_input": "t",
}
SNR = {f"{GAUSSIAN}prediction": "v", f"{TRAINING}weighting.name": "snr"}
BITS = {
    "data.name": "heartbeat",
    "process.name": "binomial",
    "network.noise_input": "t",
    "objective.name": "variational",
}


def parts(changes):
    config = configs.base()
    config.network.name = "mlp"
    with config.unlocked():
        config.update_from_flattened_dict({"data.name": "points", **changes})
    model = builders.model(config, builders.source(config, "train").spec)
    return model, builders.objective(config, model).function


@pytest.fixture
def drawn(monkeypatch):
    """Panels in place of their picture."""

    def of(kind, changes):
        model, objective = parts(changes)
        found = []

        def keep(panels):
            found.extend(panels)
            return real(panels)

        real = plots.curve_plot
        monkeypatch.setattr(plots, "curve_plot", keep)
        first = model.process if kind == "schedule" else objective
        picture = getattr(plots, f"{kind}_plot")(first, model.schedule)
        monkeypatch.setattr(plots, "curve_plot", real)
        if picture is not None:
            assert picture.std() > 10
        return found

    return of


def normal(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))


def middles(bars):
    return 0.5 * (bars.edges[1:] + bars.edges[:-1])


def test_the_cosine_schedule(drawn):
    factors, logsnr = drawn("schedule", {})
    t = factors.curves[0].x
    np.testing.assert_allclose(factors.curves[0].y, np.cos(0.5 * np.pi * t), atol=1e-12)
    np.testing.assert_allclose(factors.curves[1].y, np.sin(0.5 * np.pi * t), atol=1e-12)
    assert not factors.log
    inside = slice(1, -1)
    expected = -2.0 * np.log(np.tan(0.5 * np.pi * t[inside]))
    np.testing.assert_allclose(logsnr.curves[0].y[inside], expected, atol=1e-9)
    # Infinite at the ends, where nothing is drawn.
    assert np.isnan(logsnr.curves[0].y[[0, -1]]).all()


def test_large_noise_is_drawn_on_a_logarithmic_axis(drawn):
    factors, _ = drawn("schedule", EDM)
    assert factors.log
    np.testing.assert_array_equal(factors.curves[0].y, 1.0)
    assert factors.curves[1].y[-1] == pytest.approx(80.0)


def test_noise_levels_of_edm_are_normal_in_logsnr(drawn):
    """log sigma ~ N(-1.2, 1.2), so logsnr = -2 log sigma ~ N(2.4, 2.4); the weight on F is 1."""
    _, logsnr, weight = drawn("time", EDM)
    x = middles(logsnr.bars)
    np.testing.assert_allclose(logsnr.bars.heights, normal(x, 2.4, 2.4), atol=2e-3)
    np.testing.assert_allclose(logsnr.curves[0].y, normal(x, 2.4, 2.4), atol=2e-3)
    np.testing.assert_allclose(weight.curves[0].y, 1.0, rtol=1e-6)


def test_times_of_a_flow_are_logit_normal(drawn):
    """With alpha = 1 - t and sigma = t, logsnr = -2 logit(t) ~ N(0, 2)."""
    times, logsnr, _ = drawn("time", FLOW)
    t = middles(times.bars)
    density = normal(np.log(t / (1.0 - t)), 0.0, 1.0) / (t * (1.0 - t))
    np.testing.assert_allclose(times.bars.heights, density, atol=0.03)
    np.testing.assert_allclose(
        logsnr.bars.heights, normal(middles(logsnr.bars), 0.0, 2.0), atol=2e-3
    )


def test_a_weight_tilts_what_is_drawn(drawn):
    """Equal errors of eps under the prediction v weigh alpha^2 = logistic(logsnr)."""
    _, logsnr, weight = drawn("time", SNR)
    x = middles(logsnr.bars)
    expected = 1.0 / (1.0 + np.exp(-x))
    np.testing.assert_allclose(weight.curves[0].y, expected, rtol=1e-6)
    assert weight.log
    tilted = expected * logsnr.bars.heights
    assert np.sum(logsnr.curves[0].y * np.diff(logsnr.bars.edges)) == pytest.approx(1.0)
    np.testing.assert_allclose(
        logsnr.curves[0].y / logsnr.curves[0].y.max(), tilted / tilted.max(), rtol=1e-6
    )


def test_bits_show_what_is_kept_and_steps_drawn_alike(drawn):
    (kept,) = drawn("schedule", BITS)
    np.testing.assert_allclose(kept.curves[0].y, 1.0 - kept.curves[0].x)
    (times,) = drawn("time", BITS)
    np.testing.assert_allclose(times.bars.heights, 1.0)
    assert len(times.bars.heights) == 100


def test_adapted_draws_are_said_to_be_so(drawn):
    times, *_ = drawn("time", {**FLOW, f"{TRAINING}adaptive.name": "loss"})
    assert "follow the loss" in times.x_label


def test_a_process_without_levels_has_no_plot():
    assert plots.schedule_plot(object(), None) is None
    assert plots.time_plot(object(), None) is None
