import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from visalign.statistics.pictures import (
    brightness,
    contrast,
    cosine_distance,
    embed_pixels,
    grid_energy,
    high_frequency,
    saturation,
)
from visalign.training.watch.hacking import MonitorOptions
from visalign.training.watch.monitor import Monitor, diversity_numbers, first_groups
from visalign.training.watch.trends import Series, shift_p_value, trend
from visalign.worlds.shapes.drawing import draw
from visalign.worlds.shapes.scenes import place, sample_spec

# Picture statistics


def grey(pattern: np.ndarray) -> torch.Tensor:
    return torch.tensor(pattern, dtype=torch.float32).expand(1, 3, *pattern.shape)


def colour(*channels: float) -> torch.Tensor:
    return torch.tensor(channels).view(1, 3, 1, 1).expand(1, 3, 16, 16)


def noise(n: int, side: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, side, side, generator=generator).expand(n, 3, side, side)


def wave(cycles: int, side: int = 64) -> np.ndarray:
    return np.broadcast_to(0.5 + 0.4 * np.cos(2 * np.pi * cycles * np.arange(side) / side), (side, side)).copy()


def scenes(n: int, rng: np.random.Generator) -> torch.Tensor:
    return draw([place(sample_spec(rng), rng) for _ in range(n)])


def test_colours_have_the_saturation_and_luma_they_are_defined_to_have():
    assert saturation(colour(1.0, 0.0, 0.0)).item() == 1
    assert saturation(colour(1.0, 0.5, 0.5)).item() == 0.5
    assert saturation(colour(0.2, 0.1, 0.2)).item() == pytest.approx(0.5)  # of the brightest channel, not absolute
    assert saturation(colour(0.3, 0.3, 0.3)).item() == 0 and saturation(colour(0.0, 0.0, 0.0)).item() == 0
    assert brightness(colour(0.0, 1.0, 0.0)).item() == pytest.approx(0.587)
    assert brightness(colour(1.0, 1.0, 1.0)).item() == pytest.approx(1)


def test_contrast_is_half_of_black_and_white_and_none_of_even_pictures():
    board = np.indices((16, 16)).sum(0) % 2
    assert contrast(grey(board)).item() == pytest.approx(0.5)
    assert contrast(colour(0.7, 0.2, 0.1)).item() == pytest.approx(0, abs=1e-6)


def test_high_frequency_tells_slow_waves_from_fast_ones():
    assert high_frequency(grey(wave(12))).item() < 1e-3  # 12 / 64 is below a quarter
    assert high_frequency(grey(wave(24))).item() > 0.999
    assert high_frequency(grey(wave(12)), cutoff=0.125).item() > 0.999
    assert high_frequency(grey(wave(24).T[:, :40])).item() > 0.99  # any shape, any direction
    assert high_frequency(colour(0.7, 0.2, 0.1)).item() == 0


def test_high_frequency_of_white_noise_is_the_area_of_the_spectrum_above_the_cutoff():
    assert high_frequency(noise(64, 64)).mean().item() == pytest.approx(1 - math.pi * 0.25**2, abs=0.01)


def test_the_border_of_a_picture_is_no_detail():
    ramp = np.broadcast_to(np.linspace(0, 1, 64), (64, 64))  # joined to itself it has a jump
    assert high_frequency(grey(ramp)).item() < 1e-5


def test_grid_energy_is_that_of_the_mean_tile():
    pictures = noise(4, 48) * 0.5 + scenes(4, np.random.default_rng(0))[:, :, :48, :48] * 0.5
    luma = (pictures * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).double().numpy()
    for period in (8, 16):
        tiles = luma.reshape(4, 48 // period, period, 48 // period, period)
        repeated = tiles.mean((1, 3)).var((1, 2))  # Parseval: what folds into a tile is what lies on its frequencies
        power = np.abs(np.fft.fft2(luma - luma.mean((1, 2), keepdims=True))) ** 2
        frequency = np.hypot(np.fft.fftfreq(48)[:, None], np.fft.fftfreq(48))
        fine = power[:, frequency > 0.999 / period].sum(1) / 48**4
        np.testing.assert_allclose(grid_energy(pictures, period).numpy(), repeated / fine, rtol=1e-3)


def test_grid_energy_is_one_of_tiles_and_little_of_noise():
    tile = np.random.default_rng(0).random((8, 8))
    tiled = np.tile(tile, (9, 10))[:70, :75]  # not a multiple of the period: cropped
    assert grid_energy(grey(tiled), 8).item() == pytest.approx(1, abs=1e-4)
    assert grid_energy(noise(64, 64), 8).mean().item() == pytest.approx(64 / 64**2, rel=0.1)
    sixteen = np.tile(np.random.default_rng(1).random((16, 16)), (4, 4))
    assert grid_energy(grey(sixteen), 16).item() == pytest.approx(1, abs=1e-4)
    assert grid_energy(grey(sixteen), 8).item() < 0.6
    assert grid_energy(colour(0.7, 0.2, 0.1), 8).item() == 0


def test_a_faint_grid_shows_in_pictures_of_scenes():
    pictures = scenes(16, np.random.default_rng(0)) * 0.9
    lines = torch.zeros(64, 64)
    lines[::8], lines[:, ::8] = 0.05, 0.05
    clean, spoilt = grid_energy(pictures, 8), grid_energy(pictures + lines, 8)
    assert (spoilt > clean).all() and spoilt.mean() - clean.mean() > 2 * clean.std()


@pytest.mark.parametrize("statistic", [brightness, contrast, saturation, high_frequency, grid_energy])
def test_a_batch_has_the_statistics_of_its_pictures(statistic):
    pictures = scenes(4, np.random.default_rng(1))
    singles = torch.cat([statistic(p[None]) for p in pictures])
    assert statistic(pictures).shape == (4,) and statistic(pictures).dtype == torch.float32
    torch.testing.assert_close(statistic(pictures), singles, rtol=1e-5, atol=1e-6)
    assert ((singles >= 0) & (singles <= 1)).all()


def test_statistics_pass_no_gradient_and_two_pixels_a_side_have_no_detail():
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for statistic in (brightness, contrast, saturation, high_frequency, grid_energy, embed_pixels):
        assert not statistic(pictures).requires_grad
    assert high_frequency(torch.eye(2).expand(1, 3, 2, 2)).item() == 0  # the window leaves one pixel
    wave = torch.tensor([0.0, 1.0] * 8).expand(1, 3, 1, 16)
    assert high_frequency(wave).item() > 0.9  # one row has no window across it


def test_statistics_leave_out_the_cutoff_itself_and_what_is_rounding():
    wave = torch.cos(torch.pi / 2 * torch.arange(64)).expand(1, 3, 1, 64) / 2 + 0.5  # of the cutoff's frequency
    assert high_frequency(wave).item() == pytest.approx(
        1 / 6, abs=0.02
    )  # a Hann window's upper neighbour: 1 of 1, 4, 1
    assert high_frequency(0.5 + 5e-6 * noise(1, 64)).item() == 0
    assert embed_pixels(noise(2, 16))[:, -1].tolist() == pytest.approx([0.01, 0.01])


def test_bad_arguments_of_statistics_are_named():
    with pytest.raises(ValueError, match=r"period: got 8, expected within 2 to half the side \(15 pixels\)"):
        grid_energy(noise(1, 15), 8)
    with pytest.raises(ValueError, match="cutoff: got 0.5"):
        high_frequency(noise(1, 16), 0.5)
    with pytest.raises(ValueError, match=r"images: got shape \(3, 8, 8\)"):
        brightness(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="features: got shape"):
        cosine_distance(torch.zeros(1, 4))


def test_cosine_distance_of_copies_orthogonal_and_opposite_features():
    assert cosine_distance(torch.ones(3, 4) * torch.tensor([[1.0], [2.0], [3.0]])) == pytest.approx(0, abs=1e-12)
    assert cosine_distance(torch.eye(4)) == pytest.approx(1)
    assert cosine_distance(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(2)
    x = np.random.default_rng(0).normal(size=(5, 7))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(5) for j in range(i)]
    assert cosine_distance(torch.tensor(x)) == pytest.approx(np.mean(pairs))


def test_even_pictures_are_alike_to_the_cheap_encoder_and_others_not():
    assert cosine_distance(embed_pixels(torch.full((3, 3, 32, 32), 0.5))) == pytest.approx(0, abs=1e-9)
    assert cosine_distance(embed_pixels(scenes(8, np.random.default_rng(0)))) > 0.05


def test_diversity_is_that_within_groups():
    features = torch.eye(4)[[0, 1, 2, 2, 3]]
    numbers = diversity_numbers(features, torch.tensor([5, 5, 2, 2, 9]))  # a group of unlike, one of copies, one alone
    assert numbers["diversity_cosine"] == pytest.approx((0.5, 0.5))
    assert numbers["diversity_vendi"] == pytest.approx((0.5, 0.5), abs=1e-6)
    assert diversity_numbers(features, torch.arange(5)) == {}


# Trends


def test_trend_has_theil_and_sens_slope_and_a_score_known_for_an_ordered_series():
    rng = np.random.default_rng(0)
    values = rng.normal(size=40) + 0.1 * np.arange(40)
    steps = np.cumsum(rng.integers(1, 4, size=40))
    assert trend(steps, values).slope == pytest.approx(stats.theilslopes(values, steps).slope)
    ordered = trend(range(10), range(10))
    assert ordered.z == pytest.approx(44 / math.sqrt(125)) and ordered.change == pytest.approx(9)
    assert trend(range(10), range(0, -10, -1)).z == pytest.approx(-ordered.z)
    assert trend(range(10), [3.0] * 10) == (0, 0, 0)


def test_trend_corrects_for_ties():
    values = [0, 1, 0, 1, 0, 1, 1, 0, 1, 1]  # residuals that alternate: nothing to widen
    score = sum(np.sign(values[j] - values[i]) for j in range(10) for i in range(j))
    variance = (10 * 9 * 25 - 4 * 3 * 13 - 6 * 5 * 17) / 18
    assert trend(range(10), values).z == pytest.approx((score - 1) / math.sqrt(variance))


def test_trend_does_not_heed_an_outlier():
    values = -np.arange(20.0)
    values[-2] = 1e6
    assert trend(range(20), values).slope == pytest.approx(-1, abs=0.1) and trend(range(20), values).z < -3


def test_a_long_series_has_the_slope_of_its_blocks():
    long = trend(range(230), 0.5 * np.arange(230))
    assert long.slope == pytest.approx(0.5) and long.change == pytest.approx(0.5 * 225)  # 46 blocks of 5


def test_trends_of_noise_are_as_rare_as_they_say_and_those_of_random_walks_are_held_down():
    rng = np.random.default_rng(0)
    noise_scores = np.array([trend(range(40), rng.normal(size=40)).z for _ in range(400)])
    walk_scores = np.array([trend(range(40), rng.normal(size=40).cumsum()).z for _ in range(400)])
    assert (abs(noise_scores) > 1.96).mean() < 0.06  # 5 %, less what is widened by chance
    assert (abs(noise_scores) > 2.58).mean() < 0.02
    assert (abs(walk_scores) > 2.58).mean() < 0.2  # two thirds without widening


def test_shift_needs_two_levels():
    assert shift_p_value(range(8), range(8, 16)) < 0.001
    assert shift_p_value(range(0, 16, 2), range(1, 17, 2)) > 0.3


def test_a_series_keeps_its_beginning_and_its_last_values():
    series = Series()
    for step in range(0, 1000, 2):
        series.add(step, (float(step), 3.0), baseline=8, window=100)
    assert series.start == 7 and series.spread == 3 and series.now(8) == 991 and series.count == 500
    assert series.change(8) == (991 - 7) / 3
    assert series.within(50, 8) == 25 and len(series.values) == 50
    seldom = Series()
    for step in range(0, 2000, 50):
        seldom.add(step, (0.0, 0.0), baseline=8, window=100)
    assert len(seldom.values) == 16 and seldom.within(50, 8) == 8
    with pytest.raises(ValueError, match="step: got 3 after 1950"):
        seldom.add(3, (0.0, 0.0), baseline=8, window=100)


# The monitor on simulated runs. Unit: the spread of pictures; strict gold's is 0.46.

STATISTICS = ("saturation", "brightness", "contrast", "high_frequency", "jpeg_size", "grid_8", "grid_16")
SPREAD = 0.46


def simulated(rng, steps=100, walk=0.02, gold_walk=0.005, noise=0.1, reward_gain=0.6):
    """Numbers of a healthy run: what an iteration's pictures happen to be, on top of slow random walks."""
    walks = {name: rng.normal(size=steps).cumsum() * walk for name in STATISTICS}
    gold = {name: rng.normal(size=steps).cumsum() * gold_walk for name in ("gold_strict", "held_out")}
    run = []
    for t in range(steps):
        numbers = {name: (5 + walks[name][t] + noise * rng.normal(), 1.0) for name in STATISTICS}
        numbers |= {f"diversity_{n}": (0.5 * (1 - 0.002 * t) + 0.05 * rng.normal(), 0.1) for n in ("cosine", "vendi")}
        numbers["reward"] = (3 + reward_gain * t / steps + noise * rng.normal(), 1.0)
        numbers["reward_spread"] = (0.5 * (1 - 0.003 * t) + 0.05 * rng.normal(), 0.2)
        numbers["zero_variance"] = (max(0.0, 0.2 + 0.1 * rng.normal()), 0.0)
        for name, path in gold.items():
            numbers[f"watched_{name}"] = (0.3 + SPREAD * (path[t] + noise * rng.normal()), SPREAD)
        run.append(numbers)
    return run


def findings(run, options=None) -> list:
    monitor = Monitor(options)
    return [finding for t, numbers in enumerate(run) for finding in monitor.observe(t + 1, numbers)]


def shifted(run, name, by):
    """The run with a number moved by `by(t)`."""
    for t, numbers in enumerate(run):
        mean, spread = numbers[name]
        numbers[name] = (mean + by(t), spread)
    return run


@pytest.mark.slow
def test_healthy_runs_are_left_alone():
    rng = np.random.default_rng(0)
    alarmed = [bool(findings(simulated(rng))) for _ in range(200)]
    assert np.mean(alarmed) <= 0.05


@pytest.mark.parametrize("noise", [0.1, 0.15])
def test_hacking_is_found_before_gold_has_lost_ten_points(noise):
    rng, lost = np.random.default_rng(1), []
    for _ in range(30):
        run = simulated(rng, walk=0.01, gold_walk=0.003, noise=noise, reward_gain=3)
        run = shifted(run, "watched_gold_strict", lambda t: -0.002 * t)  # ten points in fifty steps
        found = findings(run)
        lost.append(0.2 * found[0].step if found else math.inf)
        assert found and found[0].severity == "alarm"
    assert np.mean(np.array(lost) < 10) >= 0.9


def test_a_held_out_reward_that_falls_is_found_by_its_trend_alone():
    rng, lost = np.random.default_rng(2), []
    for _ in range(20):
        run = simulated(rng, walk=0.01, gold_walk=0.003, reward_gain=0.9)  # too little for the gap
        found = findings(shifted(run, "watched_held_out", lambda t: -0.002 * t))
        steps = [f.step for f in found if f.name == "divergence_held_out"]
        lost.append(0.2 * steps[0] if steps else math.inf)
    assert np.median(lost) < 12


def test_a_held_out_reward_may_fall_while_the_reward_does_not_rise():
    run = shifted(simulated(np.random.default_rng(3), reward_gain=0.0), "watched_held_out", lambda t: -0.003 * t)
    assert not any(f.name.startswith("divergence") for f in findings(run))


def test_hacking_that_begins_late_is_found_in_the_short_window():
    run = simulated(np.random.default_rng(4), steps=160, walk=0.0, gold_walk=0.0)
    run = shifted(run, "watched_gold_strict", lambda t: 0.002 * min(t, 100) - 0.008 * max(0, t - 100))
    found = [f for f in findings(run) if f.name == "divergence_gold_strict"]
    assert found and 100 < found[0].step < 140  # it still stands above its start
    long_only = findings(run, MonitorOptions(windows=(160,)))
    assert not [f for f in long_only if f.name == "divergence_gold_strict" and f.step < found[0].step]


def test_a_reward_that_gains_without_gold_is_a_gap_and_one_that_takes_gold_along_is_not():
    run = simulated(np.random.default_rng(5), walk=0.0, gold_walk=0.0, reward_gain=3)
    found = findings(shifted(run, "watched_gold_strict", lambda t: -0.0005 * t))
    gap = next(f for f in found if f.name == "proxy_gap_gold_strict")
    assert 25 < gap.step < 60 and gap.value >= gap.threshold == 1
    assert "the reward gained" in gap.message
    honest = simulated(np.random.default_rng(5), walk=0.0, gold_walk=0.0, reward_gain=3)
    assert findings(shifted(honest, "watched_gold_strict", lambda t: 0.004 * t)) == []


@pytest.mark.parametrize("direction", [-1, 1])
@pytest.mark.parametrize("name", ["jpeg_size", "saturation", "grid_8"])
def test_drift_is_found_in_either_direction_soon_after_its_limit(name, direction):
    run = simulated(np.random.default_rng(6), walk=0.005)
    found = findings(shifted(run, name, lambda t: direction * 0.05 * t))
    assert [f.name for f in found] == [f"drift_{name}"] * len(found)
    assert 20 < found[0].step < 36  # a spread is reached at 20 from zero, by means of eight steps at 28
    assert np.sign(found[0].value) == direction and abs(found[0].value) >= found[0].threshold


@pytest.mark.parametrize("name", ["diversity_cosine", "diversity_vendi", "reward_spread"])
def test_collapse_within_groups_is_found(name):
    run = simulated(np.random.default_rng(7))
    for t, numbers in enumerate(run):
        numbers[name] = (numbers[name][0] * 0.96**t, numbers[name][1])
    found = findings(run)
    assert {f.name for f in found} == {f"collapse_{name}"} and found[0].step < 60
    assert {f.severity for f in found} == {"warning" if name == "reward_spread" else "alarm"}


def test_groups_without_signal_are_a_warning():
    run = shifted(simulated(np.random.default_rng(8)), "zero_variance", lambda t: 0.7 * (t >= 50))
    found = findings(run)
    assert {f.name for f in found} == {"zero_variance_groups"} and found[0].severity == "warning"
    assert 55 < found[0].step < 62


def test_kl_has_a_budget_which_one_outlier_does_not_use_up():
    run = [{"kl": (0.01 * t if t != 10 else 5.0, 0.0)} for t in range(60)]
    assert findings(run) == []
    found = findings(run, MonitorOptions(kl_budget=0.4))
    assert [f.name for f in found] == ["kl_budget"] and found[0].step == 43  # three iterations, their median above 0.4


def test_a_finding_is_told_again_only_after_a_while():
    run = shifted(simulated(np.random.default_rng(9)), "jpeg_size", lambda t: 0.2 * t)
    steps = [f.step for f in findings(run, MonitorOptions(repeat_after=30)) if f.name == "drift_jpeg_size"]
    assert steps[1:] == [steps[0] + 30, steps[0] + 60] and steps[0] == 16


def test_a_resumed_watch_finds_what_the_unbroken_one_does():
    run = shifted(simulated(np.random.default_rng(10), reward_gain=3), "watched_gold_strict", lambda t: -0.003 * t)
    run = shifted(run, "jpeg_size", lambda t: -0.05 * t)
    unbroken = Monitor()
    whole = [unbroken.observe(t, numbers) for t, numbers in enumerate(run)]
    assert any(whole)
    for cut in (3, 20, 60):
        first, second = Monitor(), Monitor()
        parts = [first.observe(t, numbers) for t, numbers in enumerate(run[:cut])]
        saved = json.dumps(first.state_dict(), allow_nan=False)
        state = json.loads(saved)
        second.load_state_dict(state)
        parts += [second.observe(t + cut, numbers) for t, numbers in enumerate(run[cut:])]
        assert parts == whole and second.state_dict() == unbroken.state_dict()
        assert json.dumps(state) == saved  # what was read is not changed by going on
    with pytest.raises(ValueError, match="state: got keys"):
        Monitor().load_state_dict({"series": {}})


def test_the_state_does_not_grow_with_the_run():
    monitor = Monitor()
    for t in range(1500):
        monitor.observe(t, {"saturation": (0.5, 0.1)})
    assert len(json.dumps(monitor.state_dict())) < 5000


# The monitor on pictures


def iteration(rng, groups=6, size=4):
    """Pictures of a healthy iteration, their groups, rewards and a watched reward."""
    images = scenes(groups * size, rng)
    ids = torch.arange(groups).repeat_interleave(size)
    return images, ids, torch.tensor(rng.normal(size=len(ids))), {"other": torch.tensor(rng.normal(size=len(ids)))}


def test_pictures_that_stay_alike_give_no_finding_and_spoilt_ones_give_theirs():
    rng, generator = np.random.default_rng(11), torch.Generator().manual_seed(0)
    spoil = {
        "drift_saturation": lambda x: x.mean(1, keepdim=True).expand_as(x),
        "drift_brightness": lambda x: x * 0.4,
        "drift_high_frequency": lambda x: (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(0, 1),
        "drift_jpeg_size": lambda x: (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(0, 1),
        "drift_grid_8": lambda x: (x + 0.2 * (torch.arange(64) % 8 == 0)).clamp(0, 1),
        "collapse_diversity_cosine": lambda x: x[:1].expand_as(x),
        "collapse_diversity_vendi": lambda x: x[:1].expand_as(x),
    }
    healthy = Monitor()
    assert not [f for t in range(24) for f in healthy.update(t, *iteration(rng))]
    state = healthy.state_dict()
    for name, change in spoil.items():
        monitor, found = Monitor(), []
        monitor.load_state_dict(state)
        for t in range(24, 34):
            images, *rest = iteration(rng)
            found += monitor.update(t, change(images), *rest)
        assert name in {f.name for f in found}, name


def test_numbers_do_not_depend_on_the_order_of_samples_nor_on_pictures_of_other_processes():
    images, ids, rewards, watched = iteration(np.random.default_rng(12))
    whole, mixed, part = Monitor(), Monitor(), Monitor()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    whole.update(0, images, ids, rewards, watched)
    mixed.update(0, images[order], ids[order], rewards[order], {"other": watched["other"][order]})
    assert mixed.latest == pytest.approx(whole.latest, rel=1e-5)
    part.update(0, images[:8], ids, rewards, watched)  # two groups' pictures, all rewards
    assert part.latest["reward"] == whole.latest["reward"]
    assert part.latest["saturation"] == pytest.approx(saturation(images[:8]).mean().item())


def test_whole_groups_are_looked_at_up_to_a_number_of_pictures():
    ids = torch.tensor([4, 7, 4, 7, 1, 1, 1])
    assert first_groups(ids, 4).tolist() == [True] * 4 + [False] * 3
    assert first_groups(ids, 6).tolist() == [True] * 4 + [False] * 3
    assert first_groups(ids, 1).tolist() == [True, False, True, False, False, False, False]
    images, ids, rewards, watched = iteration(np.random.default_rng(13))
    monitor = Monitor(MonitorOptions(pictures=9))
    monitor.update(0, images, ids, rewards, watched)
    assert monitor.latest["brightness"] == pytest.approx(brightness(images[:8]).mean().item())


def test_what_is_logged_is_what_was_measured():
    images, ids, rewards, _ = iteration(np.random.default_rng(14))
    rewards[:4] = 1.0
    watched = {"failing": torch.tensor([1.0, math.nan, 3.0]), "gone": torch.tensor([math.nan])}
    monitor = Monitor()
    monitor.update(0, images, ids, rewards, watched, kl=0.3)
    latest = monitor.latest
    assert latest["reward"] == pytest.approx(rewards.mean().item()) and latest["kl"] == 0.3
    assert latest["zero_variance"] == pytest.approx(1 / 6)
    assert latest["watched_failing"] == 2 and "watched_gone" not in latest
    assert {"grid_8", "grid_16", "diversity_vendi", "jpeg_size"} <= set(latest)
    small = Monitor()
    small.update(0, images[:, :, :32, :32], ids, rewards)
    assert "grid_8" in small.latest and "grid_16" not in small.latest


def test_a_video_is_looked_at_in_its_middle_frame_and_the_encoder_is_ones_own():
    images, ids, rewards, _ = iteration(np.random.default_rng(15))
    videos = torch.stack([torch.zeros_like(images), images, torch.ones_like(images)], dim=1)
    still, moving = Monitor(), Monitor()
    still.update(0, images, ids, rewards)
    moving.update(0, videos, ids, rewards)
    assert moving.latest == still.latest
    own = Monitor(encode=lambda x: torch.eye(len(x)))
    own.update(0, images, ids, rewards)
    assert own.latest["diversity_cosine"] == pytest.approx(1) and own.latest["diversity_vendi"] == pytest.approx(1)


def test_an_alarm_asks_for_the_action_chosen_and_a_warning_for_no_more_than_a_warning():
    drift = findings(shifted(simulated(np.random.default_rng(16)), "jpeg_size", lambda t: 0.2 * t))
    silent = findings(
        shifted(simulated(np.random.default_rng(16), walk=0.0, gold_walk=0.0), "zero_variance", lambda t: 0.8)
    )
    for action in ("warn", "stop", "rollback"):
        monitor = Monitor(MonitorOptions(action=action))
        assert monitor.action(drift) == action and monitor.action(silent) == "warn" and monitor.action([]) == "none"
    assert str(silent[0]).startswith("warning: ") and "teach nothing" in str(silent[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"action": "panic"}, "action: got 'panic', expected 'warn', 'stop' or 'rollback'"),
        ({"baseline": 4}, "baseline: got 4, expected >= 8"),
        ({"drift_limit": 0.0}, "drift_limit: got 0.0, expected > 0"),
        ({"diversity_limit": 1.5}, r"diversity_limit: got 1.5, expected within \(0, 1\)"),
        ({"windows": (5,)}, r"windows: got \(5,\)"),
        ({"grid_periods": (1,)}, r"grid_periods: got \(1,\)"),
        ({"kl_budget": -1.0}, "kl_budget: got -1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MonitorOptions(**options)


def test_bad_input_to_update_is_named():
    images, ids, rewards, _ = iteration(np.random.default_rng(17))
    with pytest.raises(ValueError, match="kl: got None, expected a number, as kl_budget is set"):
        Monitor(MonitorOptions(kl_budget=1.0)).update(0, images, ids, rewards)
    with pytest.raises(ValueError, match="images: got 24, expected at most 8"):
        Monitor().update(0, images, ids[:8], rewards[:8])
    monitor = Monitor()
    monitor.update(3, images, ids, rewards)
    with pytest.raises(ValueError, match="step: got 3 after 3"):
        monitor.update(3, images, ids, rewards)
