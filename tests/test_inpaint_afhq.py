"""RePaint against the exact posterior of two Gaussian pixels, its walk, the pixels it must keep, its numbers, its errors."""
import csv
import os

import pytest
import torch
from PIL import Image

import common
import ddpm_afhq
import inpaint_afhq as script

COV = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)   # of (known, hole); seen: known = 1.5
MEAN, VAR = 1.2, 0.36                                              # of hole given known
KNOWN = torch.tensor([True, False])[None, None, None]


def gaussian_net(alpha_bar, cov=COV):
    """The exact eps_hat of data ~ N(0, cov): sqrt(1 - ab) (ab cov + (1 - ab) I)^-1 x_t."""
    def net(xt, t):
        ab = alpha_bar[t[0]]
        gain = (1 - ab).sqrt() * torch.linalg.inv(ab * cov + (1 - ab) * torch.eye(len(cov), dtype=torch.float64))
        return (xt.flatten(1) @ gain).reshape(xt.shape)
    return net


def moments(steps, repeats):
    """Mean and variance of the hole, without chance: the sampler is linear in its noises, so feed it unit ones."""
    alpha_bar, levels = script.schedule("linear"), script.walk(common.even(1000, steps), 10, repeats)
    count = 2 * len(levels)                                        # x_T and one draw a move, two pixels each
    drawn = iter(torch.eye(count, dtype=torch.float64).reshape(len(levels), 2, count))

    def unit():
        return next(drawn).T[:, None, None]                        # (count, 1, 1, 2): pixel j of this draw in row 2k + j

    def zero():
        return torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    net = gaussian_net(alpha_bar)
    mean = script.sample(net, zero(), alpha_bar, levels, zero, zero() + 1.5, KNOWN, clip=False)[0, 0, 0]
    assert mean[0] == 1.5
    if repeats > 5:
        return mean[1].item(), None
    start = unit()
    rows = script.sample(net, start, alpha_bar, levels, unit, torch.zeros_like(start), KNOWN, clip=False)
    return mean[1].item(), rows[:, 0, 0, 1].square().sum().item()


def test_replacement_is_biased_and_repaint_ever_less_so():
    found = {r: moments(250, r) for r in (1, 2, 5, 10, 20)}
    mean = [found[r][0] for r in (1, 2, 5, 10, 20)]
    assert mean == pytest.approx([0.744, 0.941, 1.094, 1.145, 1.169], abs=0.002)   # computed apart: 0.75 ... 1.175
    assert 0.70 < mean[0] < 0.80 and mean == sorted(mean) and abs(mean[-1] - MEAN) < 0.05
    assert [found[r][1] for r in (1, 2, 5)] == pytest.approx([0.48, 0.41, 0.35], abs=0.01)


@pytest.mark.parametrize("steps, jump, repeats, moves, down", [
    (250, 10, 10, 4570, 2410), (250, 10, 5, 2170, 1210), (100, 10, 5, 820, 460), (50, 5, 5, 410, 230),
    (250, 10, 1, 250, 250), (21, 10, 2, 61, 41), (10, 20, 5, 10, 10), (1, 10, 10, 1, 1)])
def test_walk_has_the_published_counts(steps, jump, repeats, moves, down):
    levels = script.walk(list(range(steps, -1, -1)), jump, repeats)
    difference = [b - a for a, b in zip(levels[:-1], levels[1:], strict=True)]
    assert (len(difference), difference.count(-1)) == (moves, down) and set(difference) <= {-1, 1}
    assert levels[0] == steps == max(levels) and levels[-1] == 0 == min(levels) and levels.count(0) == 1
    first = levels.index(1)
    if repeats > 1 and jump < steps:                                # at 1 it goes up by jump, repeats - 1 times
        assert levels[first:first + jump + 1] == list(range(1, jump + 2))
        assert levels.count(1) == repeats
    falling = common.even(1000, steps)
    assert script.walk(falling, jump, repeats) == [falling[steps - i] for i in levels]     # of any levels, the same places


def test_the_bias_is_no_matter_of_the_jump_until_jumps_are_long():
    """What the docstring of walk says: about equal cost, and more bias where few places are left to turn."""
    alpha_bar = script.schedule("linear")
    def zero():
        return torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    mean, cost = {}, {}
    for jump in (1, 10, 50, 100):
        levels = script.walk(common.even(1000, 250), jump, 5)
        cost[jump] = sum(s < t for t, s in zip(levels, levels[1:]))
        mean[jump] = script.sample(gaussian_net(alpha_bar), zero(), alpha_bar, levels, zero, zero() + 1.5, KNOWN, clip=False)[0, 0, 0, 1].item()
    assert all(0.8 * 5 * 250 < c <= 5 * 250 for c in cost.values())
    assert list(mean.values()) == pytest.approx([1.097, 1.094, 1.011, 0.827], abs=0.002)


def test_with_nothing_known_it_is_ddpm_to_the_bit():
    alpha_bar, shape = script.schedule(), (3, 8, 8)
    def net(xt, t):
        return torch.sin(3 * xt) + t[:, None, None, None] / 1000
    noise = common.image_noise(shape, 5, 4)
    mine = script.sample(net, noise(), alpha_bar, common.even(1000, 20), noise, torch.zeros(4, *shape),
                         torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    noise = common.image_noise(shape, 5, 4)
    assert torch.equal(mine, ddpm_afhq.sample(net, noise(), alpha_bar, common.even(1000, 20), noise))


def test_going_up_adds_the_noise_of_the_level_reached():
    torch.manual_seed(0)
    alpha_bar = script.schedule()
    x0 = torch.full((1, 1, 400, 400), 0.7, dtype=torch.float64)
    xs = alpha_bar[300].sqrt() * x0 + (1 - alpha_bar[300]).sqrt() * torch.randn_like(x0)
    xt = script.sample(None, xs, alpha_bar, [300, 350], lambda: torch.randn_like(x0), x0, KNOWN)
    assert xt.mean().item() == pytest.approx(0.7 * alpha_bar[350].sqrt().item(), abs=0.01)
    assert xt.var().item() == pytest.approx(1 - alpha_bar[350].item(), rel=0.02)


def test_known_pixels_have_the_noise_of_the_level_they_are_mixed_at():
    torch.manual_seed(0)
    alpha_bar, x0 = script.schedule(), torch.full((1, 1, 400, 400), 0.7, dtype=torch.float64)
    xs = script.sample(lambda xt, t: xt, torch.randn_like(x0), alpha_bar, [350, 300], lambda: torch.randn_like(x0), x0,
                       torch.ones(1, 1, 400, 400, dtype=torch.bool))
    assert xs.mean().item() == pytest.approx(0.7 * alpha_bar[300].sqrt().item(), abs=0.01)
    assert xs.var().item() == pytest.approx(1 - alpha_bar[300].item(), rel=0.02)


def test_numbers_on_known_answers():
    torch.manual_seed(0)
    x, where = torch.rand(2, 3, 32, 32) * 2 - 1, ~common.known_pixels("box", 32)
    wrong = torch.where(where, x + 0.2, x - 7)                     # outside `where` nothing counts
    assert common.psnr(wrong, x, where) == pytest.approx([20.0, 20.0], abs=1e-3)     # 10 log10(4 / 0.04)
    assert common.ssim(x, x, where) == pytest.approx([1.0, 1.0], abs=1e-5)
    a, b = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), -0.25)
    assert common.ssim(a, b, where).item() == pytest.approx((2 * 0.5 * -0.25 + 4e-4) / (0.25 + 0.0625 + 4e-4), abs=1e-4)
    assert (common.ssim(0.5 + 0.3 * x, 0.5 - 0.3 * x, where) < -0.5).all()         # same brightness, structure reversed
    step = torch.where(where, 1.0, -0.5).expand(1, 3, 32, 32)
    assert common.seam(step, ~where).item() == pytest.approx(1.5)
    half = common.known_pixels("half", 32)
    ramp = torch.arange(32.0).square().expand(1, 3, 32, 32)         # 16^2 - 15^2 across the middle
    assert common.seam(ramp, half) == common.seam(ramp, ~half) == 31
    assert common.seam(torch.zeros(1, 3, 32, 32), ~where).item() == 0
    assert common.seam(step, torch.ones_like(where)).isnan()       # no edge


def test_fills_are_scored_as_they_are_saved_and_gains_picture_by_picture():
    torch.manual_seed(0)
    x, where = torch.rand(3, 3, 32, 32) * 1.6 - 0.8, ~common.known_pixels("box", 32)
    x = common.to_float(common.to_uint8(x))
    shift = torch.tensor([2.0, 4.0, 8.0])[:, None, None, None] / 127.5             # whole levels of 255, over 0.4 of a level
    near, far = torch.where(where, x + shift + 0.4 / 127.5, x), torch.where(where, x + 2 * shift, x)
    rows = common.score_fills(far, x, where, method="far", picture=[0, 1, 2])
    rows += common.score_fills(near, x, where, method="near", picture=[0, 1, 2])
    assert [r["psnr_dB"] for r in rows] == pytest.approx([36.09, 30.07, 24.05, 42.11, 36.09, 30.07], abs=0.01)    # 20 log10(255 / 4) ...
    assert [r["picture"] for r in rows] == [0, 1, 2] * 2 and rows[0]["method"] == "far" and 0 < rows[0]["ssim"] < 1
    same = common.score_fills(x, x.flip(0), where)
    assert sum(r["seam"] for r in same) / 3 == pytest.approx(1, rel=1e-6)        # a multiple of the originals' mean
    common.add_gains(rows)
    assert [r["gain_dB"] for r in rows] == pytest.approx([0] * 3 + [6.0206] * 3, abs=1e-3)
    rows[3]["psnr_dB"] += 3
    common.add_gains(rows)
    assert [r["gain_se"] for r in rows] == pytest.approx([0] * 3 + [1] * 3, abs=1e-3)       # gains 9, 6, 6: sd 3 ** 0.5, over 3 ** 0.5


@pytest.fixture
def weights(tmp_path):
    """A small untrained checkpoint whose last layer isn't zero, so that it draws something."""
    torch.manual_seed(0)
    config = dict(size=16, channels=3, patch=2, ch=8, mult=[1, 2], blocks=1, attn=[4], dropout=0.0)
    net = script.UNet(**config)
    torch.nn.init.normal_(net.conv_out.weight, std=0.05)
    kept = dict(script="ddpm_afhq", net=config, method=dict(schedule="cosine", predict="v", weight="min-snr", T=1000),
                names=["a"], iter=0, ema=net.state_dict())
    torch.save(kept, tmp_path / "w.pt")
    return kept, str(tmp_path / "w.pt")


def read(path):
    return torch.stack([common.read_image(p, 16) for p in sorted(path.glob("*.png"))])


def test_known_pixels_come_back_bit_for_bit_and_seeds_count(tmp_path, weights, capsys):
    first = [*"--device cpu --dtype fp32 --steps 8 --jump 2 --repeats 2 --known half --gif".split(), "--ckpt", weights[1]]
    script.main([*first, "--n", "3", "--fills", "2", "--out", str(tmp_path / "a")])
    said = capsys.readouterr().out.strip().split("\n")
    assert said[-1].startswith(f"{tmp_path / 'a' / 'samples.png'}: 6 pictures, 8 steps, NFE 14, ")
    original, fills = read(tmp_path / "a" / "original"), read(tmp_path / "a" / "png")
    assert len(original) == 3 and len(fills) == 6
    assert torch.equal(fills[..., :8], original.repeat_interleave(2, 0)[..., :8])
    for i in range(6):
        assert not torch.equal(fills[i, ..., 8:], original[i // 2, ..., 8:])       # the hole is not peeped into
    assert not torch.equal(fills[0], fills[1])
    faces = sorted(common.FACES.glob("*.png"))
    assert torch.equal(original, torch.stack([common.read_image(faces[i * len(faces) // 3], 16) for i in range(3)]))     # a cat, a dog, a wild animal
    assert len({path.name.split("_")[0] for path in faces}) == 3 and len(faces) == 12
    script.main([*first, "--image", str(tmp_path / "a" / "original"), "--n", "9", "--fills", "2", "--out", str(tmp_path / "b")])
    assert (read(tmp_path / "b" / "png").int() - fills.int()).abs().max() <= 1     # the same fills of the same pictures
    rows = list(csv.DictReader(open(tmp_path / "b" / "numbers.csv")))
    assert [(r["picture"], r["fill"]) for r in rows][:3] == [("0", "0"), ("0", "1"), ("1", "0")] and len(rows) == 6
    where = ~common.known_pixels("half", 16)
    a, b = common.to_float(fills), common.to_float(original).repeat_interleave(2, 0)
    assert [float(r["psnr_dB"]) for r in rows] == pytest.approx(common.psnr(a, b, where).tolist(), abs=0.05)
    mean = sum(float(r["psnr_dB"]) for r in rows) / 6
    assert any(line.startswith(f"| half | {mean:.3g} ± ") for line in said)
    assert (tmp_path / "a" / "samples.gif").is_file() and (tmp_path / "a" / "walk.png").is_file()
    assert "seed" in Image.open(tmp_path / "a" / "png" / "000000.png").text
    assert Image.open(tmp_path / "a" / "samples.png").size[1] == 2 * (5 * 18 + 2)      # original, hole, two fills, mean: 18 px each, doubled


def test_pictures_of_an_earlier_run_go_and_the_users_stay(tmp_path, weights, monkeypatch):
    flags = [*"--device cpu --dtype fp32 --steps 3 --jump 1 --repeats 1 --fills 1".split(), "--ckpt", weights[1], "--out", str(tmp_path)]
    script.main([*flags, "--n", "3"])
    Image.new("RGB", (16, 16)).save(tmp_path / "original" / "holiday.png")
    before = read(tmp_path / "png")

    def full(*_):
        raise OSError("no space left")
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_uint8", full)
        with pytest.raises(OSError):
            script.main([*flags, "--n", "2", "--seed", "9"])
    assert torch.equal(read(tmp_path / "png"), before)                # nothing is lost before the new ones are complete
    script.main([*flags, "--n", "2"])
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == ["000000.png", "000001.png"]
    assert sorted(p.name for p in (tmp_path / "original").iterdir()) == ["000000.png", "000001.png", "holiday.png"]
    assert not (tmp_path / "png.new").exists()


def test_without_the_faces_in_assets_a_sentence_names_the_way_out(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr(common, "FACES", tmp_path / "gone")
    refused(script.main, ["--ckpt", weights[1], "--out", str(tmp_path / "out"), "--steps", "1"], capsys, "gone", "--image")


def refused(main, flags, capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    error = capsys.readouterr().err
    said = error.strip().split("\n")[-1]
    assert stop.value.code == 2 and "Traceback" not in error and said.endswith("."), (flags, error)
    assert all(str(word) in said for word in words), (flags, said)


def test_wrong_input_gets_a_sentence(tmp_path, weights, capsys):
    state, path = weights
    torch.save({**state, "script": "cfg_afhq"}, tmp_path / "labelled.pt")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    Image.new("L", (20, 20)).save(tmp_path / "large.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    for extra in (["--ckpt", tmp_path / "labelled.pt"], ["--image", tmp_path / "bad.png"], ["--image", tmp_path / "none.png"],
                  ["--image", tmp_path / "empty"], ["--image", tmp_path / "pipe"], ["--steps", "0"], ["--steps", "1001"],
                  ["--repeats", "0"], ["--jump", "0"], ["--fills", "0"], ["--known", "round"], ["--known", tmp_path / "pipe"],
                  ["--known", tmp_path / "large.png"], ["--known", tmp_path / "white.png"], ["--n", "0"], ["--train"]):
        flags = ["--device", "cpu", "--out", tmp_path / "o", "--ckpt", path, *extra]
        refused(script.main, [str(f) for f in flags], capsys, extra[-1])
    assert not any((tmp_path / "o").iterdir())


def test_help_speaks_of_this_script(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "white where pixels stay" in said and "--train" not in said and "--data" not in said
