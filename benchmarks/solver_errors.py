"""Error of every solver against network evaluations, on a mixture with an exact denoiser.

    python benchmarks/solver_errors.py --write

Data: a mixture of five Gaussians in two dimensions; cosine schedule; equal steps in logsnr from -8
to 8, in float64. States at the start are draws of the exact noisy distribution, and what is judged
is the state at the end, at sigma > 0, so that the error is that of the steps alone.

  deterministic  root mean square over 64 states of the distance from the end of the ODE, which an
                 adaptive method of order 8 finds to 1e-12 or so
  stochastic     sliced Wasserstein-1 distance of 32,768 ends to the exact mixture, whose quantiles
                 along each of 24 directions are known; exact draws have the floor
  adaptive       evaluations a sample needs by itself, at several tolerances

Every solver of `solvers.SOLVERS` is there, or the script stops. Prints tables in Markdown;
`--write` puts them between the markers in docs/mathematics.md, and draws docs/images/solvers.png.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
from jax.scipy.stats import norm
from solver_picture import Line, panel, save

from diffusion_jax.diffusion import schedules, solvers, time_grids
from diffusion_jax.diffusion.processes import Gaussian

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/mathematics.md", ROOT / "docs/images/solvers.png"
BEGIN, END = "<!-- solver_errors.py: begin -->", "<!-- solver_errors.py: end -->"
BUDGETS = (8, 16, 32, 64, 128, 256)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
STATES, SAMPLES, DIRECTIONS = 64, 2**15, 24
SCHEDULE = schedules.cosine()
LOGSNR = (-8.0, 8.0)
WEIGHTS = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
MEANS = np.array([[-1.1, -0.4], [0.3, 0.9], [1.2, -0.7], [-0.2, -1.3], [-0.9, 1.2]])
STDS = np.array([0.3, 0.2, 0.35, 0.15, 0.25])


class Case(NamedTuple):
    """A solver with options; `family` gives it its colour."""

    name: str
    options: dict[str, Any]
    family: str

    @property
    def label(self) -> str:
        """As in the tables."""
        given = (f"{k}={v:g}" if type(v) is float else f"{k}={v}" for k, v in self.options.items())
        return " ".join([self.name, *given])

    def steps(self, budget: int) -> int:
        """Steps that make `budget` evaluations."""
        if self.name == "pndm":
            # Four in each of the first three steps, or two in the first.
            return budget - 9 if self.options.get("prk", True) else budget - 1
        if self.name == "lms" and self.options.get("corrected"):
            # Four in each of the first order - 1 steps.
            return budget - 3 * (self.options["order"] - 1)
        return budget // PER_STEP.get(self.name, 1)


PER_STEP = {
    "heun": 2,
    "midpoint": 2,
    "rk4": 4,
    "kdpm2": 2,
    "kdpm2_ancestral": 2,
    "flow_heun": 2,
}
DETERMINISTIC = [
    Case("ddim", {}, "euler"),
    Case("euler", {}, "euler"),
    Case("flow_euler", {}, "euler"),
    Case("dpmpp_1m", {}, "euler"),
    Case("dpmpp_1s", {}, "euler"),
    Case("heun", {}, "runge-kutta"),
    Case("flow_heun", {}, "runge-kutta"),
    Case("midpoint", {}, "runge-kutta"),
    Case("kdpm2", {}, "runge-kutta"),
    Case("rk4", {}, "runge-kutta"),
    Case("lms", {"order": 4}, "multistep"),
    Case("pndm", {}, "multistep"),
    Case("pndm", {"prk": False}, "multistep"),
    Case("bdia", {}, "multistep"),
    Case("dpmpp_2m", {}, "dpm-solver++"),
    Case("dpmpp_3m", {}, "dpm-solver++"),
    Case("dpmpp_2s", {}, "dpm-solver++"),
    Case("dpmpp_3s", {}, "dpm-solver++"),
    Case("dpmsolver", {"order": 2}, "dpm-solver"),
    Case("dpmsolver", {"order": 3}, "dpm-solver"),
    Case("dpmsolver_singlestep", {"order": 2}, "dpm-solver"),
    Case("dpmsolver_singlestep", {"order": 3}, "dpm-solver"),
    Case("deis", {"order": 2}, "dpm-solver"),
    Case("deis", {"order": 3}, "dpm-solver"),
    Case("unipc", {"order": 2}, "unipc"),
    Case("unipc", {"order": 3}, "unipc"),
    Case("unipc", {"order": 3, "corrector": False}, "unipc"),
]
STOCHASTIC = [
    Case("ddpm", {}, "ddpm"),
    Case("ddpm", {"variance": "large"}, "ddpm"),
    Case("ancestral", {}, "ddpm"),
    Case("ddim", {"eta": 1.0}, "ddpm"),
    Case("euler_ancestral", {}, "ddpm"),
    Case("kdpm2_ancestral", {}, "runge-kutta"),
    Case("flow_heun", {"eta": 1.0}, "runge-kutta"),
    Case("euler", {"s_churn": 10.0}, "churn"),
    Case("heun", {"s_churn": 10.0}, "churn"),
    Case("dpmpp_sde", {"order": 1}, "ddpm"),
    Case("dpmpp_sde", {"order": 2}, "dpm-solver++"),
    Case("dpmpp_sde", {"order": 3}, "dpm-solver++"),
    Case("dpmpp_sde", {"order": 3, "corrected": False}, "dpm-solver++"),
    Case("dpmpp_sde_singlestep", {"order": 2}, "dpm-solver++"),
    Case("dpmsolver_sde", {"order": 2}, "dpm-solver"),
    Case("flow_euler", {"renewal": 1.0}, "consistency"),
    Case("lcm", {}, "consistency"),
    Case("tcd", {}, "consistency"),
    # Beside them, to compare: the same measure without noise.
    Case("ddim", {"eta": 0.0}, "without noise"),
    Case("dpmpp_2m", {}, "without noise"),
]
COLOURS = {
    "euler": (90, 90, 90),
    "ddpm": (90, 90, 90),
    "runge-kutta": (55, 135, 60),
    "multistep": (160, 110, 20),
    "dpm-solver++": (25, 70, 170),
    "dpm-solver": (205, 85, 25),
    "unipc": (130, 50, 150),
    "churn": (130, 50, 150),
    "consistency": (160, 110, 20),
    "adaptive": (200, 30, 60),
    "without noise": (0, 140, 140),
}


def with_corrected(cases: Sequence[Case]) -> list[Case]:
    """Beside each method of order 3 or more that offers it, the corrected one."""
    result = []
    for case in cases:
        result.append(case)
        option = inspect.signature(solvers.get(case.name)).parameters.get("corrected")
        offered = option is not None and option.default is False
        # UniC corrects all steps by itself.
        offered &= case.name != "unipc" or not case.options.get("corrector", True)
        third = case.name in ("dpmpp_3m", "pndm") or case.options.get("order", 0) > 2
        if offered and third and "corrected" not in case.options:
            result.append(case._replace(options={**case.options, "corrected": True}))
    return result


def denoise(x: Any, t: Any) -> Any:
    """E[x0 | x_t = x] of the mixture, x [B, 2]; t a scalar or [B]."""
    alpha, sigma = (jnp.reshape(level(t), (-1, 1)) for level in (SCHEDULE.alpha, SCHEDULE.sigma))
    variance = alpha**2 * STDS**2 + sigma**2
    # |x - alpha mean|^2 by products, which are cheaper than arrays of a further axis.
    squares = (x**2).sum(1, keepdims=True) - 2.0 * alpha * (x @ MEANS.T)
    squares = squares + alpha**2 * (MEANS**2).sum(1)
    share = jax.nn.softmax(jnp.log(WEIGHTS) - jnp.log(variance) - 0.5 * squares / variance)
    gain = alpha * STDS**2 / variance
    return (share * (1.0 - alpha * gain)) @ MEANS + (share * gain).sum(1, keepdims=True) * x


def noisy_draws(rng: np.random.Generator, count: int, t: float) -> np.ndarray:
    """Exact draws of x_t, [count, 2]."""
    part = rng.choice(len(WEIGHTS), count, p=WEIGHTS)
    x0 = MEANS[part] + STDS[part, None] * rng.normal(size=(count, 2))
    x_t = SCHEDULE.alpha(t) * x0 + SCHEDULE.sigma(t) * rng.normal(size=(count, 2))
    return np.asarray(x_t)


def exact_ends(x: np.ndarray, t: float, s: float) -> np.ndarray:
    """Where the ODE takes x, over l = log(sigma/alpha): dy/dl = y - x0 with y = x/alpha."""
    call = jax.jit(denoise)

    def slope(level: float, y: np.ndarray) -> np.ndarray:
        r = SCHEDULE.t_from_logsnr(-2.0 * level)
        state = y.reshape(x.shape)
        return np.asarray(state - call(SCHEDULE.alpha(r) * state, r)).ravel()

    ends = [-0.5 * SCHEDULE.logsnr(r) for r in (t, s)]
    y = (x / SCHEDULE.alpha(t)).ravel()
    found = scipy.integrate.solve_ivp(slope, ends, y, "DOP853", rtol=1e-13, atol=1e-13)
    return SCHEDULE.alpha(s) * found.y[:, -1].reshape(x.shape)


class Sliced:
    """Sliced Wasserstein-1 distance to the exact distribution of x_s."""

    def __init__(self, count: int, s: float) -> None:
        angles = np.pi * (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS
        self.directions = np.stack([np.cos(angles), np.sin(angles)])
        alpha, sigma = SCHEDULE.alpha(s), SCHEDULE.sigma(s)
        means, std = alpha * MEANS @ self.directions, np.sqrt(alpha**2 * STDS**2 + sigma**2)
        places = np.linspace(-4.0, 4.0, 20001)
        u = (np.arange(count) + 0.5) / count
        self.quantiles = np.empty((count, DIRECTIONS))
        for k in range(DIRECTIONS):
            cdf = np.asarray(norm.cdf((places[:, None] - means[:, k]) / std)) @ WEIGHTS
            self.quantiles[:, k] = np.interp(u, cdf, places)

    def __call__(self, x: np.ndarray) -> float:
        """The distance of the samples x [count, 2]."""
        return float(np.abs(np.sort(x @ self.directions, axis=0) - self.quantiles).mean())


def run(case: Case, budget: int, ends: tuple[float, float], x: Any, key: Any) -> np.ndarray | None:
    """The states at the end, or None where the budget is too small."""
    steps = case.steps(budget)
    if steps < (4 if case.name == "pndm" else 2) or steps < case.options.get("order", 1):
        return None
    start, stop = ends
    if case.name == "tcd":
        # Its last step ends at (1 - gamma) of the time that it is given.
        stop = stop / (1.0 - inspect.signature(solvers.tcd).parameters["gamma"].default)
    times = time_grids.uniform_logsnr(SCHEDULE, steps, start, stop)
    held: Any = Gaussian(SCHEDULE) if case.name == "ancestral" else SCHEDULE
    solver = solvers.get(case.name)
    return np.asarray(
        jax.jit(lambda x: solver(denoise, held, times, x, key=key, **case.options))(x)
    )


def adaptive(x: np.ndarray, exact: np.ndarray, ends: tuple[float, float]) -> list[tuple]:
    """(tolerance, mean and most evaluations of a sample, error) of dopri5."""
    rows = []
    for tolerance in TOLERANCES:

        def solve(x: Any, tolerance: float = tolerance) -> Any:
            return solvers.dopri5(
                denoise, SCHEDULE, ends, x, rtol=tolerance, atol=tolerance, evaluations=True
            )

        # One by one under vmap every sample keeps a count of its own; a batch makes the most.
        found, counts = jax.jit(jax.vmap(lambda x: solve(x[None])))(x)
        error = root_mean_square(np.asarray(found)[:, 0] - exact)
        rows.append((tolerance, float(counts.mean()), int(counts.max()), error))
    return rows


def root_mean_square(distance: np.ndarray) -> float:
    return float(np.sqrt((distance**2).sum(-1).mean()))


Row = tuple[Case, list[float | None]]


def measure(cases: Sequence[Case], judge: Callable, ends: Any, x: Any, key: Any) -> list[Row]:
    """The error of every case at every budget."""
    rows = []
    for case in cases:
        found = (run(case, budget, ends, x, key) for budget in BUDGETS)
        rows.append((case, [None if end is None else judge(end) for end in found]))
        print(f"  {case.label}: {cells(rows[-1][1])}", flush=True)
    return rows


def cells(errors: Sequence[float | None]) -> str:
    return " | ".join("" if error is None else f"{error:.1e}" for error in errors)


def tables(deterministic: list[Row], stochastic: list[Row], floors: list[float], rows: list) -> str:
    """Markdown."""
    head = " | ".join(map(str, BUDGETS))
    rule = "|---" * (len(BUDGETS) + 1) + "|"
    lines = [f"| deterministic, error at evaluations: | {head} |", rule]
    lines += [f"| `{case.label}` | {cells(errors)} |" for case, errors in deterministic]
    lines += ["", f"| stochastic, distance at evaluations: | {head} |", rule]
    lines += [f"| `{case.label}` | {cells(errors)} |" for case, errors in stochastic]
    lines += [f"| exact draws, mean of 8 | {cells([float(np.mean(floors))] * len(BUDGETS))} |"]
    lines += [f"| exact draws, most of 8 | {cells([max(floors)] * len(BUDGETS))} |", ""]
    lines += [
        "| `dopri5`, rtol = atol | evaluations a sample, mean | most | error |",
        "|---|---|---|---|",
    ]
    lines += [f"| {t:g} | {mean:.1f} | {most} | {error:.1e} |" for t, mean, most, error in rows]
    return "\n".join(lines)


def lines_of(results: Sequence[Row]) -> list[Line]:
    """One line for all methods whose errors are the same."""
    lines: list[tuple[list[Case], list]] = []
    for case, errors in results:
        for same, others in lines:
            pairs = zip(errors, others, strict=True)
            if all(a == b or (a and b and abs(a - b) < 1e-3 * b) for a, b in pairs):
                same.append(case)
                break
        else:
            lines.append(([case], list(errors)))
    return [
        Line(
            [case.label for case in same],
            COLOURS[same[0].family],
            [(b, e) for b, e in zip(BUDGETS, errors, strict=True) if e and np.isfinite(e)],
        )
        for same, errors in lines
    ]


def draw_picture(
    deterministic: list[Row], stochastic: list[Row], floors: list[float], rows: list
) -> None:
    """Both panels, side by side."""
    found = [(evaluations, error) for _, evaluations, _, error in rows]
    inside = [(n, e) for n, e in found if BUDGETS[0] <= n <= BUDGETS[-1]]
    alone = Line(["dopri5 (adaptive)"], COLOURS["adaptive"], inside)
    exact = Line(["exact draws"], (0, 0, 0), [(b, float(np.mean(floors))) for b in BUDGETS])
    left = panel(
        "deterministic: distance from the exact end", BUDGETS, lines_of(deterministic), alone
    )
    title = "stochastic: sliced Wasserstein distance"
    right = panel(title, BUDGETS, [*lines_of(stochastic), exact], band=floors)
    save([left, right], PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Error of every solver against evaluations.")
    parser.add_argument("--write", action="store_true", help="into docs/")
    arguments = parser.parse_args()
    left_out = set(solvers.SOLVERS) - {c.name for c in (*DETERMINISTIC, *STOCHASTIC)} - {"dopri5"}
    if left_out:
        raise SystemExit(f"no case for {', '.join(sorted(left_out))}")
    began = time.perf_counter()
    jax.config.update("jax_enable_x64", True)
    ends: Any = tuple(np.asarray(SCHEDULE.t_from_logsnr(np.array(LOGSNR))).tolist())
    rng, key = np.random.default_rng(0), jax.random.key(1)
    few, many = (noisy_draws(rng, count, ends[0]) for count in (STATES, SAMPLES))
    exact, sliced = exact_ends(few, *ends), Sliced(SAMPLES, ends[1])

    def distance(end: np.ndarray) -> float:
        return root_mean_square(end - exact)

    deterministic = measure(with_corrected(DETERMINISTIC), distance, ends, few, key)
    rows = adaptive(few, exact, ends)
    floors = [sliced(noisy_draws(rng, SAMPLES, ends[1])) for _ in range(8)]
    stochastic = measure(with_corrected(STOCHASTIC), sliced, ends, many, key)
    text = tables(deterministic, stochastic, floors, rows)
    print(text, f"{time.perf_counter() - began:.0f} s", sep="\n")
    if arguments.write:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
        draw_picture(deterministic, stochastic, floors, rows)


if __name__ == "__main__":
    main()
