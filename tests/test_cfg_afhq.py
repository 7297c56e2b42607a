"""cfg_afhq.py against exact answers: closed-form networks in float64, no training."""
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import cfg_afhq as cfg
import common
import ddim_afhq as ddim
import ddpm_afhq as ddpm

SOLVERS = ["ddpm", "ddim", "dpm1", "dpm2", "dpm++2m"]


@pytest.fixture(autouse=True)
def float64():
    """Levels between whole numbers reach the network in torch's default type: double, or orders drown in rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def level(alpha_bar, t):
    """alpha_bar at any t, by hand: its logarithm is linear in between. (B, 1, 1, 1)"""
    log_ab, t = alpha_bar.log(), torch.as_tensor(t, dtype=torch.float64).reshape(-1)
    low, high = t.floor().long(), t.ceil().long()
    return ((high == low) * log_ab[low] + (high - t) * log_ab[low] + (t - low) * log_ab[high]).exp()[:, None, None, None]


def gaussian(alpha_bar, mean, var):
    """The exact network of classes N(mean[y], var[y] I), y = 0 the whole; it counts its calls and pictures."""
    mean, var = torch.tensor(mean), torch.tensor(var)

    def net(xt, t, y):
        net.calls.append((len(xt), t.tolist(), y.tolist()))
        ab, m, v = level(alpha_bar, t), mean[y][:, None, None, None], var[y][:, None, None, None]
        return (1 - ab).sqrt() * (xt - ab.sqrt() * m) / (ab * v + 1 - ab)
    net.calls = []
    return net


def draws(seed, n=4):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, 3, 2, 2, generator=generator)


def ones(n, y=1):
    return torch.full((n,), y)


# ---------------------------------------------------------------- guidance

def recursion(alpha_bar, var_u, var_c, scale):
    """Mean and variance of DDIM's end, by the book: classes N(0, var_u) and N(1, var_c) make a step x_s = A x_t + c."""
    m, A = 0.0, 1.0
    for t in range(len(alpha_bar) - 1, 0, -1):
        ab_t, ab_s = alpha_bar[t].item(), alpha_bar[t - 1].item()
        a_t, s_t, a_s, s_s = ab_t ** 0.5, (1 - ab_t) ** 0.5, ab_s ** 0.5, (1 - ab_s) ** 0.5
        u, c = s_t / (ab_t * var_u + 1 - ab_t), s_t / (ab_t * var_c + 1 - ab_t)       # eps_u = u x, eps_c = c (x - a_t)
        slope, shift = u + scale * (c - u), -scale * c * a_t
        factor = a_s * (1 - s_t * slope) / a_t + s_s * slope
        m, A = factor * m + (s_s - a_s * s_t / a_t) * shift, factor * A
    return m, A * A


def guided_law(alpha_bar, var_u, var_c, scale):
    """The same from sample(), whose chain is affine in its start ~ N(0, 1): two starts tell all."""
    x = torch.tensor([0.0, 1.0])[:, None, None, None]
    net = gaussian(alpha_bar, [0.0, 1.0], [var_u, var_c])
    x = cfg.sample(net, x, ones(2), alpha_bar, common.even(1000, 1000), None, scale, clip=False).flatten()
    return x[0].item(), (x[1] - x[0]).item() ** 2


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guided_gaussian_of_equal_covariances_lands_on_scale_times_mean(scale):
    """Empty label N(0, 1/4), class N(1, 1/4): guided eps is that of N(scale, 1/4), so that is where samples go."""
    alpha_bar = cfg.schedule("linear")
    mean, var = guided_law(alpha_bar, 0.25, 0.25, scale)
    assert mean == pytest.approx(scale, rel=0.015, abs=0.002) and var == pytest.approx(0.25, rel=0.015)
    assert (mean, var) == pytest.approx(recursion(alpha_bar, 0.25, 0.25, scale), rel=1e-9, abs=1e-9)


def test_guidance_at_unequal_covariances_is_not_the_tilted_law():
    """N(0, 1) and N(1, 1/4) at scale 7.5. The law that guidance is said to draw from, p_u^(1-s) p_c^s, has mean 1.277
    and variance 0.0426. The chain is linear, so its true law is a recursion: mean 1.437, variance 3e-5."""
    alpha_bar, scale = cfg.schedule("linear"), 7.5
    mean, var = guided_law(alpha_bar, 1.0, 0.25, scale)
    assert (mean, var) == pytest.approx(recursion(alpha_bar, 1.0, 0.25, scale), rel=1e-8)
    assert mean == pytest.approx(1.437, abs=2e-3) and var == pytest.approx(3e-5, rel=0.2)
    tilted = 1 / ((1 - scale) / 1 + scale / 0.25)
    assert tilted == pytest.approx(0.0426, abs=1e-4) and var < tilted / 100
    assert abs(mean - tilted * scale / 0.25) > 0.1


def test_scales_0_and_1_spend_one_call_on_what_the_formula_says():
    alpha_bar, xt, y = cfg.schedule(), draws(1)(), torch.tensor([1, 2, 3, 1])
    net = gaussian(alpha_bar, [0.0, 1.0, -2.0, 0.5], [1.0, 0.2, 0.3, 0.4])
    eps = {}
    for label in (y, y * 0):
        eps[label.sum().item() > 0] = net(xt, torch.full((4,), 400), label)
    for scale in (0.0, 1, 0.5, 2.0, -1.0):
        net.calls.clear()
        got = cfg.guided(net, xt, 400, y, scale)
        torch.testing.assert_close(got, eps[False] + scale * (eps[True] - eps[False]), rtol=1e-12, atol=1e-12)
        assert [n for n, _, _ in net.calls] == [4 if scale in (0, 1) else 8]
        assert set(net.calls[0][1]) == {400}
    assert net.calls[0][2] == [1, 2, 3, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_evaluation_is_guided(solver):
    """Also the inner stage of dpm2. Then a class at scale 2 is as good as a network that says 2 eps_c - eps_u itself."""
    alpha_bar = cfg.schedule("linear")
    net = gaussian(alpha_bar, [0.0, 1.0], [1.0, 0.5])
    levels = cfg.levels_for(solver, alpha_bar, 9)
    a = cfg.sample(net, draws(1)(), ones(4), alpha_bar, levels, draws(2), 2.0, solver)
    calls = len(net.calls)
    b = cfg.sample(lambda x, t, y: 2 * net(x, t, y) - net(x, t, y * 0), draws(1)(), ones(4), alpha_bar, levels, draws(2), 1, solver)
    assert calls == 9
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_outside_the_interval_the_network_with_the_label_speaks_alone(solver, scale):
    """lo < std_t / a_t <= hi, on the levels themselves: the lower bound is left out, the upper one is not. One evaluation outside."""
    alpha_bar = cfg.schedule("linear")
    levels = cfg.levels_for(solver, alpha_bar, 9)
    ratio = ((1 - level(alpha_bar, levels)) / level(alpha_bar, levels)).sqrt().flatten().tolist()
    between = lambda i: (ratio[i] * ratio[i + 1]) ** 0.5                                     # noqa: E731
    net = gaussian(alpha_bar, [0.0, 1.0], [1.0, 0.5])
    for lo, hi, inside in ((0, math.inf, range(9)), (between(5), between(1), range(2, 6)), (1e3, math.inf, ()), (between(0), math.inf, [0])):
        guided_levels = {torch.tensor(levels[i]).item() for i in inside}

        def both(x, t, y, guided_levels=guided_levels):
            weight = scale if t[0].item() in guided_levels else 1
            return weight * net(x, t, y) + (1 - weight) * net(x, t, y * 0)
        want = cfg.sample(both, draws(1)(), ones(4), alpha_bar, levels, draws(2), 1, solver)
        net.calls.clear()
        got = cfg.sample(net, draws(1)(), ones(4), alpha_bar, levels, draws(2), scale, solver, lo=lo, hi=hi)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        if scale == 3:
            assert [n for n, _, _ in net.calls] == [8 if i in inside else 4 for i in range(9)]
            assert all(y == [1] * 4 + [0] * 4 * (i in inside) for i, (_, _, y) in enumerate(net.calls))
        else:
            assert [y for _, _, y in net.calls] == [[1 - (i in inside)] * 4 for i in range(9)]


def test_bounds_of_the_interval():
    """Level 500 has std_t / a_t = r: guided where hi = r, not where lo = r."""
    alpha_bar = cfg.schedule("linear")
    a, std = alpha_bar[500].log().exp().sqrt(), (1 - alpha_bar[500].log().exp()).sqrt()       # as sample has them, to the bit
    r, net = (std / a).item(), gaussian(alpha_bar, [0.0, 1.0], [1.0, 0.5])
    for lo, hi, pictures in ((0, r, 8), (r, math.inf, 4), (0, r * (1 - 1e-9), 4), (r * (1 - 1e-9), math.inf, 8)):
        net.calls.clear()
        cfg.sample(net, draws(1)(), ones(4), alpha_bar, [500, 0], None, 3.0, lo=lo, hi=hi)
        assert [n for n, _, _ in net.calls] == [pictures], (lo, hi)


# ---------------------------------------------------------------- solvers

@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddpm_and_ddim_are_those_of_their_own_scripts(name, clip):
    alpha_bar, levels = cfg.schedule(name), common.even(1000, 30)
    net = gaussian(alpha_bar, [0.0, 0.3], [1.0, 0.4])
    alone = lambda xt, t: net(xt, t, ones(len(xt)))      # noqa: E731
    a = cfg.sample(net, draws(1)(), ones(4), alpha_bar, levels, draws(2), 1, "ddpm", clip=clip)
    b = ddpm.sample(alone, draws(1)(), alpha_bar, levels, draws(2), "small", clip)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for eta in (0.0, 0.6):
        a = cfg.sample(net, draws(1)(), ones(4), alpha_bar, levels, draws(2), 1, "ddim", eta, clip)
        b = ddim.sample(alone, draws(1)(), alpha_bar, levels, draws(2), eta, clip)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("levels", [[1000, 500, 0], common.even(1000, 20), [1000, 700.5, 33.25, 2, 0]])
def test_ddim_is_dpm_solver_1(levels):
    """Written in two papers, they are one map; and so are the first steps of DPM-Solver++(2M) and DPM-Solver-2."""
    alpha_bar = cfg.schedule("linear")
    net = gaussian(alpha_bar, [0.0, 0.3], [1.0, 0.4])
    run = lambda levels, solver: cfg.sample(net, draws(1)(), ones(4), alpha_bar, levels, None, 3.0, solver, clip=False)  # noqa: E731
    a = run(levels, "ddim")
    torch.testing.assert_close(run(levels, "dpm1"), a, rtol=1e-11, atol=1e-11)
    for solver in ("dpm2", "dpm++2m"):
        torch.testing.assert_close(run(levels[:2], solver), run(levels[:2], "ddim"), rtol=1e-11, atol=1e-11)
        two = run(levels[:1] + levels[-1:], solver)                                          # one step, to 0
        torch.testing.assert_close(two, run(levels[:1] + levels[-1:], "ddim"), rtol=1e-11, atol=1e-11)
    if len(levels) == 3:                                                                     # no midpoint on the way to 0
        torch.testing.assert_close(run(levels, "dpm2"), a, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("steps", range(1, 10))
def test_dpm_solver_2_by_its_algorithm(steps):
    """Algorithm 1 with the midpoint found by bisection, then one or two steps of order 1 where (3.7)'s e^h has its limit."""
    alpha_bar, scale = cfg.schedule("linear"), 2.0
    net = gaussian(alpha_bar, [0.0, 0.3], [1.0, 0.4])
    lam = lambda t: 0.5 * torch.logit(level(alpha_bar, t)).item()                            # noqa: E731
    eps = lambda x, t: scale * net(x, torch.full((4,), t), ones(4)) + (1 - scale) * net(x, torch.full((4,), t), ones(4, 0))     # noqa: E731

    def to(x, eps_hat, t, s):
        a_t, a_s = level(alpha_bar, t).sqrt(), level(alpha_bar, s).sqrt()
        if s == 0:
            return (x - (1 - a_t ** 2).sqrt() * eps_hat) / a_t
        return a_s / a_t * x - (1 - a_s ** 2).sqrt() * math.expm1(lam(s) - lam(t)) * eps_hat

    def level_of(value):
        low, high = 1.0, 1000.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if lam(middle) > value else (low, middle)
        return low

    count = (steps + 1) // 2 + (steps % 2 == 0)                                              # steps, of which the last goes to 0
    nodes = [level_of(lam(1000) + (lam(1) - lam(1000)) * i / max(1, count - 1)) for i in range(count)] + [0]
    x = draws(1)()
    for i, (t, s) in enumerate(zip(nodes[:-1], nodes[1:], strict=True)):
        if s > 0 and i < (steps - 1) // 2:
            m = level_of((lam(t) + lam(s)) / 2)
            x = to(x, eps(to(x, eps(x, t), t, m), m), t, s)
        else:
            x = to(x, eps(x, t), t, s)
    got = cfg.sample(net, draws(1)(), ones(4), alpha_bar, cfg.levels_for("dpm2", alpha_bar, steps), None, scale, "dpm2")
    torch.testing.assert_close(got, x, rtol=1e-8, atol=1e-8)


def test_second_step_of_2m_by_hand():
    """Uneven steps: D leans on the last x0_hat by h / (2 h before). (With r upside down the errors of the steps
    telescope, (h before^2 - h^2) / 2 each, so that no order would show it.)"""
    alpha_bar, net = cfg.schedule("linear"), gaussian(cfg.schedule("linear"), [0.0, 0.3], [1.0, 0.4])
    levels, x = [1000, 600, 500, 100], draws(1)()
    a, s = (level(alpha_bar, levels).sqrt().flatten().tolist(), (1 - level(alpha_bar, levels)).sqrt().flatten().tolist())
    lam, D, before = [math.log(p / q) for p, q in zip(a, s, strict=True)], None, None
    x_i = x
    for i in range(3):
        h = lam[i + 1] - lam[i]
        x0_hat = (x_i - s[i] * net(x_i, torch.full((4,), levels[i]), ones(4))) / a[i]
        D = x0_hat if i == 0 else x0_hat + h / (2 * (lam[i] - lam[i - 1])) * (x0_hat - before)
        x_i, before = s[i + 1] / s[i] * x_i - a[i + 1] * math.expm1(-h) * D, x0_hat
    got = cfg.sample(net, x, ones(4), alpha_bar, levels, None, 1, "dpm++2m", clip=False)
    torch.testing.assert_close(got, x_i, rtol=1e-10, atol=1e-10)


def mixture(alpha_bar):
    """Every pixel for itself ~ 0.3 N(-1, 0.2^2) + 0.7 N(0.8, 0.4^2): a network that isn't linear in x."""
    w, m, sd = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 0.8]), torch.tensor([0.2, 0.4])

    def eps_hat(xt, ab):
        v = ab[..., None] * sd ** 2 + 1 - ab[..., None]
        d = xt[..., None] - ab[..., None].sqrt() * m
        share = (w.log() - 0.5 * v.log() - d ** 2 / (2 * v)).softmax(-1)
        return (1 - ab).sqrt() * (share * d / v).sum(-1)
    return lambda xt, t, y: eps_hat(xt, level(alpha_bar, t)), eps_hat


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm1", 1), ("dpm2", 2), ("dpm++2m", 2)])
def test_order_of_the_solvers(solver, order):
    """Steps in lambda of 1 : 2 : 1 : 2 ..., from T to lambda = 2; the truth is scipy's 8th-order integration in lambda
    of d(x / a) = -exp(-lambda) eps dlambda. The slope of log error against log steps is the order."""
    alpha_bar = cfg.schedule("linear")
    net, eps_hat = mixture(alpha_bar)
    lam = 0.5 * torch.logit(alpha_bar[1:])
    ends = lam[-1].item(), 2.0
    xT = torch.linspace(-2, 2, 12)

    def slope(lam, z):
        ab = torch.sigmoid(torch.tensor(2 * lam))
        return -math.exp(-lam) * eps_hat(ab.sqrt() * torch.from_numpy(z), ab.expand(len(z))).numpy()

    z = solve_ivp(slope, ends, (xT / alpha_bar[-1].sqrt()).numpy(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    want = torch.from_numpy(z) * torch.sigmoid(torch.tensor(2 * ends[1])).sqrt()
    error = []
    for steps in (160, 320):
        nodes = ends[0] + (ends[1] - ends[0]) * torch.tensor([0, *[1, 2] * (steps // 2)]).cumsum(0) / (1.5 * steps)
        nodes = torch.stack([nodes, torch.cat([(nodes[1:] + nodes[:-1]) / 2, nodes[:1]])], 1).flatten()[:-1]    # and middles
        t = np.interp(torch.nn.functional.softplus(-2 * nodes), -alpha_bar.log(), np.arange(1001)).tolist()
        levels = t if solver == "dpm2" else t[::2]
        x = cfg.sample(net, xT[:, None, None, None], ones(12), alpha_bar, levels, None, 1, solver, clip=False).flatten()
        error.append((x - want).abs().max().item())
    assert error[1] > 1e-10
    assert order - 0.2 < math.log2(error[0] / error[1]) < order + 0.3


def test_alpha_bar_between_the_levels_is_log_linear_and_exact_at_whole_ones():
    for name in ("linear", "cosine"):
        alpha_bar = cfg.schedule(name)
        for t in (0, 0.25, 1, 17, 500.5, 999.9, 1000):
            assert cfg.alpha_bar_at(alpha_bar, t).item() == pytest.approx(level(alpha_bar, t).item(), rel=1e-12)
        many = cfg.alpha_bar_at(alpha_bar, torch.tensor([0, 999, 1000]))
        assert many.dtype == torch.float64 and many[0] == 1
        torch.testing.assert_close(many, alpha_bar[[0, 999, 1000]], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_lambda_levels_spend_what_they_are_given(name):
    """--steps evaluations for any number, even in lambda down to level 1; of an even number the last midpoint is missing."""
    alpha_bar = cfg.schedule(name)
    lam = lambda t: 0.5 * torch.logit(level(alpha_bar, t)).item()       # noqa: E731
    net = gaussian(alpha_bar, [0.0, 0.3], [1.0, 0.4])
    for steps in range(1, 61):
        levels = cfg.levels_for("dpm2", alpha_bar, steps)
        assert len(levels) == steps + 1 and levels[-1] == 0 and np.diff(levels).max() < 0
        net.calls.clear()
        x = cfg.sample(net, draws(1)(), ones(4), alpha_bar, levels, None, 2.0, "dpm2")
        assert x.isfinite().all() and {n for n, _, _ in net.calls} == {8}
        assert [t[0] for _, t, _ in net.calls] == levels[:-1]
        gaps = np.diff([lam(t) for t in levels[:-1]])
        if steps > 2:
            assert np.allclose(gaps[:-1], gaps[0], rtol=1e-6)
            assert gaps[-1] == pytest.approx(gaps[0] * (2 - steps % 2), rel=1e-6)
        assert steps == 1 or levels[-2] == pytest.approx(1, abs=1e-6)
        assert levels[0] == pytest.approx(1000, abs=1e-6) if name == "linear" else lam(levels[0]) == pytest.approx(-5.1, abs=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic"])
def test_karras_levels_are_even_in_noise_to_the_power_of_a_seventh(name):
    alpha_bar = cfg.schedule(name)
    ratio = lambda t: ((1 - level(alpha_bar, t)) / level(alpha_bar, t)).sqrt().item()       # noqa: E731
    net = gaussian(alpha_bar, [0.0, 0.3], [1.0, 0.4])
    for steps in (1, 2, 3, 5, 10, 37, 100):
        levels = cfg.levels_for("dpm++2m", alpha_bar, steps)
        roots = [ratio(t) ** (1 / 7) for t in levels[:-1]]
        assert len(levels) == steps + 1 and levels[-1] == 0 and np.diff(levels).max() < 0
        assert ratio(levels[0]) == pytest.approx(min(80, ratio(1000)), rel=1e-6)
        assert np.allclose(np.diff(roots), (roots[-1] - roots[0]) / max(1, steps - 1), rtol=1e-4)
        assert steps == 1 or levels[-2] == pytest.approx(1, abs=1e-6)
        net.calls.clear()
        assert cfg.sample(net, draws(1)(), ones(4), alpha_bar, levels, None, 2.0, "dpm++2m").isfinite().all() and len(net.calls) == steps


def test_each_solver_has_a_spacing_of_its_own_and_takes_another_on_demand():
    alpha_bar = cfg.schedule()
    kinds = {kind: cfg.levels_for("ddim", alpha_bar, 7, kind) for kind in ("uniform", "karras", "lambda")}
    assert kinds["uniform"] == common.even(1000, 7) and len({tuple(k) for k in kinds.values()}) == 3
    for solver, own in zip(SOLVERS, ("uniform", "uniform", "uniform", "lambda", "karras"), strict=True):
        assert cfg.levels_for(solver, alpha_bar, 7) == kinds[own]
        for kind, levels in kinds.items():
            assert cfg.levels_for(solver, alpha_bar, 7, kind) == levels
    for T in (1, 2, 5, 40):                                     # few levels, and as many steps
        for solver in SOLVERS:
            levels = cfg.levels_for(solver, cfg.schedule("linear", T), T)
            assert len(levels) == T + 1 and levels[-1] == 0 and max(levels) <= T


def test_ten_evaluations_keep_fine_detail_on_karras_levels_and_lose_it_on_even_ones():
    """Data N(0, sd^2) make the chain linear: what comes out is a share of the true sd. Fine detail has a small sd."""
    alpha_bar = cfg.schedule("cosine")
    for sd, even in ((0.05, 0.282), (0.2, 0.750), (1.0, 0.977)):
        net = gaussian(alpha_bar, [0.0, 0.0], [sd ** 2, sd ** 2])
        x = [cfg.sample(net, torch.ones(1, 1, 1, 1), ones(1), alpha_bar, levels, None, 1, "dpm++2m", clip=False).item() / sd
             for levels in (common.even(1000, 10), *[cfg.levels_for("dpm++2m", alpha_bar, steps) for steps in (10, 40)])]
        assert x[0] == pytest.approx(even, abs=0.002) and 0.9 < x[1] < 1.15 and x[2] == pytest.approx(1, abs=0.03)


def test_clipping_only_where_the_solver_has_an_x0_hat():
    """x_t = 300 under a silent network: x0_hat of 300 / a is clipped by ddpm, ddim and dpm++2m, whose end is then 1."""
    alpha_bar, xt = cfg.schedule("linear"), torch.full((1, 1, 1, 1), 300.0)
    net = lambda x, t, y: torch.zeros_like(x)       # noqa: E731
    for solver in SOLVERS:
        levels = cfg.levels_for(solver, alpha_bar, 8, None if solver == "dpm2" else "uniform")
        x = cfg.sample(net, xt, ones(1), alpha_bar, levels, lambda: torch.zeros_like(xt), 1, solver).item()
        assert x == pytest.approx(1) if solver in ("ddpm", "ddim", "dpm++2m") else x > 300
        x = cfg.sample(net, xt, ones(1), alpha_bar, levels, lambda: torch.zeros_like(xt), 1, solver, clip=False).item()
        assert x > 300


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_ddpm_and_eta_draw_noise(solver):
    alpha_bar, drawn = cfg.schedule(), []
    levels = cfg.levels_for(solver, alpha_bar, 6)

    def noise():
        drawn.append(1)
        return torch.zeros(4, 3, 2, 2)
    cfg.sample(gaussian(alpha_bar, [0.0, 0.0], [1.0, 1.0]), draws(1)(), ones(4), alpha_bar, levels, noise, 1, solver)
    assert len(drawn) == (6 if solver == "ddpm" else 0)
    if solver == "ddim":
        cfg.sample(gaussian(alpha_bar, [0.0, 0.0], [1.0, 1.0]), draws(1)(), ones(4), alpha_bar, levels, noise, 1, solver, eta=0.1)
        assert len(drawn) == 6


# ---------------------------------------------------------------- loss and network

def spy(value=0.0):
    def net(xt, t, y):
        net.calls.append((xt, t, y))
        return torch.full_like(xt, value)
    net.calls = []
    return net


def test_labels_are_dropped_one_in_ten_each_for_itself():
    torch.manual_seed(0)
    y = torch.arange(60_000) % 3 + 1
    net = spy()
    cfg.loss(net, torch.zeros(60_000, 1, 1, 1), y, cfg.schedule())
    (_, t, kept), = net.calls
    gone = kept == 0
    assert torch.equal(kept[~gone], y[~gone])
    sd = math.sqrt(0.1 * 0.9 / 60_000)
    assert abs(gone.double().mean().item() - 0.1) < 4 * sd
    for k in (1, 2, 3):
        assert abs(gone[y == k].double().mean().item() - 0.1) < 4 * sd * math.sqrt(3)
    assert abs((gone[1:] & gone[:-1]).double().mean().item() - 0.01) < 4 * math.sqrt(0.01 / 60_000)
    assert abs(np.corrcoef(gone, t)[0, 1]) < 4 / math.sqrt(60_000)           # nor do they hang on the level
    for drop, share in ((0.0, 0.0), (1.0, 1.0)):
        cfg.loss(net, torch.zeros(90, 1, 1, 1), y[:90], cfg.schedule(), drop=drop)
        assert (net.calls[-1][2] == 0).double().mean() == share


@pytest.mark.parametrize("weight", ["uniform", "min-snr"])
@pytest.mark.parametrize("error", ["l2", "l1", "huber"])
def test_loss_by_hand(weight, error):
    torch.manual_seed(0)
    alpha_bar, net = cfg.schedule("cosine"), spy(0.25)
    x0 = torch.rand(64, 3, 4, 4) * 2 - 1
    got = cfg.loss(net, x0, ones(64), alpha_bar, weight, error)
    (xt, t, _), = net.calls
    ab = alpha_bar[t][:, None, None, None]
    eps = (xt - ab.sqrt() * x0) / (1 - ab).sqrt()
    assert eps.mean().abs() < 0.1 and abs(eps.std() - 1) < 0.1 and t.min() >= 1
    d = (eps - 0.25).abs()
    d = {"l2": d ** 2, "l1": d, "huber": torch.where(d < 1, d ** 2 / 2, d - 0.5)}[error]
    snr = ab / (1 - ab)
    w = torch.where(snr > 5, 5 / snr, torch.ones_like(snr)) if weight == "min-snr" else 1.0
    assert got.item() == pytest.approx((w * d).mean().item(), rel=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_denoiser_turns_v_into_eps_at_levels_in_between(bf16):
    """eps = sqrt(1 - ab) x_t + sqrt(ab) v, for a network that says v = 0.25 y; and a network of eps is passed on as it is."""
    torch.set_default_dtype(torch.float32)
    alpha_bar, asked = cfg.schedule("cosine"), []

    def network(xt, t, y):
        asked.append((t, y))
        return 0.25 * y[:, None, None, None] * torch.ones_like(xt)
    xt, t, y = torch.randn(3, 1, 2, 2), torch.tensor([1.0, 500.5, 1000.0]), torch.tensor([0, 1, 3])
    ab = level(alpha_bar, t.double())
    want = (1 - ab).sqrt() * xt + ab.sqrt() * 0.25 * y[:, None, None, None]
    got = cfg.Denoiser(network, alpha_bar, "v", bf16)(xt, t, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(cfg.Denoiser(network, alpha_bar, "eps", bf16)(xt, t, y), network(xt, t, y))
    assert all(torch.equal(a, t) and torch.equal(b, y) for a, b in asked)


def test_network_tells_labels_apart_and_pictures_in_a_batch_don_t_mix():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    net = cfg.UNet(size=16, channels=3, ch=8, mult=(1, 2), blocks=1, attn=(8,), classes=5).eval()
    assert net.label.num_embeddings == 6
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(1, 3, 16, 16).expand(6, -1, -1, -1), torch.full((6,), 300.5)
    out = net(x, t, torch.arange(6))
    assert out.shape == (6, 3, 16, 16)
    apart = torch.cdist(out.flatten(1), out.flatten(1)) + torch.eye(6)
    assert apart.min() > 1e-3
    torch.testing.assert_close(net(x[:1], t[:1], torch.tensor([4])), out[4:5], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the program

TINY = dict(size=16, channels=3, classes=3, patch=2, ch=8, mult=[1, 2], blocks=1, attn=[8], dropout=0.0)
TRAIN = ["--train", "--data", "drawn", "--size", "16", "--ch", "8", "--mult", "1", "2", "--blocks", "1", "--attn", "8", "--batch", "4",
         "--device", "cpu", "--dtype", "fp32", "--steps", "2", "--n", "2"]


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """program(*flags, names=...): the last line printed, or what the program says as it refuses; it samples from an untrained network."""
    torch.set_default_dtype(torch.float32)
    real = common.drawn_faces
    monkeypatch.setattr(common, "drawn_faces", lambda n, size, seed: real(30, size, seed))
    monkeypatch.setattr("sys.argv", ["cfg_afhq.py"])

    def run(*flags, names=("cat", "dog", "wild"), train=False):
        if not train:
            torch.manual_seed(0)
            network = cfg.Network(**TINY)
            for p in network.parameters():
                if not p.any():
                    torch.nn.init.normal_(p, std=0.02)
            state = dict(script="cfg_afhq", net=TINY, method=dict(schedule="cosine", predict="v", weight="min-snr"), names=list(names), iter=0,
                         ema=network.state_dict())
            torch.save(state, tmp_path / "weights.pt")
            flags = ["--ckpt", tmp_path / "weights.pt", "--steps", 3, "--n", 2, "--device", "cpu", *flags]
        try:
            cfg.main([str(f) for f in ["--out", tmp_path / "out", *flags]])
        except SystemExit as end:
            assert end.code == 2
            said = capsys.readouterr().err.splitlines()
            assert len([line for line in said if line.startswith("cfg_afhq.py: ")]) == 1, said
            return said[-1]
        return capsys.readouterr().out.splitlines()[-1]
    return run


def pictures(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))


def test_pictures_lie_by_class_and_by_scale(program, tmp_path):
    program()
    assert pictures(tmp_path / "out" / "png") == [f"{c}/00000{i}.png" for c in ("cat", "dog", "wild") for i in (0, 1)]
    line = program("--scale", 0, 1, 2.5, "--label", "dog", "--interval", 0, "inf")
    assert "6 pictures, 3 steps, NFE 3 3 6," in line
    assert pictures(tmp_path / "out" / "png") == [f"{c}/00000{i}.png" for c in ("scale0/unlabelled", "scale1/dog", "scale2.5/dog") for i in (0, 1)]
    with common.Image.open(tmp_path / "out" / "samples.png") as file:
        assert file.size == (2 * 18 + 2, 3 * 18 + 2)                       # a row for each scale


def test_nfe_under_an_interval_is_that_of_the_levels_inside(program):
    ratio = ((1 - cfg.schedule()) / cfg.schedule()).sqrt()
    inside = sum(0.5 < ratio[t].item() <= 2 for t in common.even(1000, 10)[:-1])
    assert 0 < inside < 10 and f"NFE {10 + inside}," in program("--solver", "ddim", "--steps", 10, "--interval", 0.5, 2)
    assert "NFE 20," in program("--steps", 10, "--interval", 0, "inf") and "NFE 10," in program("--steps", 10, "--interval", 2, 2)


def test_a_class_by_name_or_number_and_names_win(program, tmp_path):
    for names, label, folder in ((("cat", "dog", "wild"), "dog", "dog"), (("cat", "dog", "wild"), "3", "wild"), (("0", "1", "2"), "1", "1"), (("0", "1", "2"), "3", "2")):
        program("--label", label, names=names)
        assert pictures(tmp_path / "out" / "png") == [f"{folder}/000000.png", f"{folder}/000001.png"]
    assert common.labels(["0", "1", "2"], "1") == {"1": 2} and common.labels(["a", "b"], "2") == {"b": 2} and common.labels(["a", "b"]) == {"a": 1, "b": 2}
    assert "'lion'" in program("--label", "lion") and "'4'" in program("--label", 4, "--scale", 0, 2)


@pytest.mark.parametrize("flags", [
    *[("--solver", s, "--eta", 0) for s in ("ddpm", "dpm1", "dpm2", "dpm++2m")], ("--solver", "dpm1", "--clip"), ("--solver", "dpm2", "--no-clip"),
    ("--solver", "dpm2", "--spacing", "karras"), ("--scale", "nan"), ("--scale", 2, "inf"), ("--interval", "nan", 2), ("--interval", -1, 2), ("--interval", 1),
    ("--drop", 2), ("--drop", "nan"), ("--eta", 2), ("--n", 0), ("--spacing", "square"), ("--solver", "euler")])
def test_flags_that_mean_nothing_are_refused(program, tmp_path, flags):
    said = program(*flags)
    assert any(f.replace("no-", "") in said for f in flags if str(f).startswith("--") and f != "--solver" or "euler" in flags), said
    assert not (tmp_path / "out" / "png").exists()


def test_flags_that_mean_something_are_not(program):
    for flags in (("--solver", "dpm++2m", "--no-clip", "--spacing", "uniform"), ("--solver", "ddim", "--eta", 1, "--clip", "--spacing", "lambda"), ("--solver", "ddpm", "--no-clip")):
        assert "6 pictures, 3 steps, NFE 6," in program(*flags, "--interval", 0, "inf")


@pytest.mark.parametrize("name", ["../../x", "..", "/tmp/x", "a/b", ""])
def test_a_class_name_of_a_foreign_checkpoint_leads_nowhere(program, tmp_path, name):
    before = pictures(tmp_path.parent)
    assert "weights.pt" in program(names=("cat", name, "wild"))
    assert pictures(tmp_path.parent) == before


def test_a_training_shows_the_classes_in_turn_and_remembers_what_it_dropped(program, tmp_path, monkeypatch):
    asked, real = [], cfg.sample

    def spied(denoiser, xt, y, *rest):
        asked.append((y.tolist(), rest))
        return real(denoiser, xt, y, *rest)
    monkeypatch.setattr(cfg, "sample", spied)
    dropped = []
    monkeypatch.setattr(cfg, "loss", lambda *args, real=cfg.loss: dropped.append(args[-1]) or real(*args))
    program(*TRAIN, "--iters", 2, "--save", 2, "--drop", 0, train=True)
    assert asked[0][0] == [1, 2, 3, 1, 2, 3, 1, 2] and asked[0][1][-2:] == (2.0, "dpm++2m") and (tmp_path / "out" / "samples_000002.png").is_file()
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert state["net"] == TINY and state["names"] == ["floppy", "pointed", "striped"] and state["flags"]["drop"] == 0
    assert pictures(tmp_path / "out" / "png") == [f"{c}/00000{i}.png" for c in ("floppy", "pointed", "striped") for i in (0, 1)]
    program("--resume", "--data", "drawn", "--iters", 3, "--n", 1, "--steps", 1, "--device", "cpu", "--dtype", "fp32", train=True)
    assert dropped == [0, 0, 0]                                # --resume has brought it back
    assert "'lion'" in program(*TRAIN, "--iters", 1, "--out", tmp_path / "other", "--label", "lion", train=True)
    assert not (tmp_path / "other" / "model.pt").exists()      # told before the training
