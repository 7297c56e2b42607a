"""The image scripts from one end to the other on drawn faces: train, be killed, resume to the bit, sample, on two processes."""
import csv
import importlib
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ["ddpm_afhq", "ddim_afhq", "cfg_afhq"]
DATA = ["--data", "drawn", "--size", "16", "--batch", "4", "--lr", "0.05", "--device", "cpu", "--dtype", "fp32"]
TINY = [*DATA, "--ch", "8", "--mult", "1", "2", "--blocks", "1", "--attn", "8", "--dropout", "0.1"]
FEW = ["--n", "2", "--steps", "3"]


@pytest.fixture(autouse=True)
def few_faces(monkeypatch):
    real = common.drawn_faces
    monkeypatch.setattr(common, "drawn_faces", lambda n, size, seed: real(60, size, seed))


@pytest.fixture
def no_figures(monkeypatch):
    """The curve of the loss takes longer to draw than these trainings; the first test looks at it."""
    monkeypatch.setattr(common.Run, "write_log", lambda run: None)


def main(script, *flags):
    importlib.import_module(script).main([str(f) for f in flags])


def saved(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def pixels(path):
    with Image.open(path) as file:
        return np.array(file).astype(int)


def same(a, b):
    """Two checkpoints are equal to the bit, but for the speed in the log."""
    assert a.keys() == b.keys()
    for key in ("script", "net", "method", "flags", "names", "iter"):
        assert a[key] == b[key], key
    assert [row[:2] for row in a["log"]] == [row[:2] for row in b["log"]]
    for key in ("model", "ema"):
        assert a[key].keys() == b[key].keys()
        for name in a[key]:
            assert torch.equal(a[key][name], b[key][name]), f"{key} {name}"
    assert a["opt"]["param_groups"] == b["opt"]["param_groups"]
    for i, state in a["opt"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["opt"]["state"][i][name])), f"optimiser {i} {name}"


@pytest.mark.parametrize(("script", "patch"), [("ddpm_afhq", 1), ("ddim_afhq", 2), ("cfg_afhq", 2)])
def test_train_be_killed_resume_sample(script, patch, tmp_path, monkeypatch, capsys):
    """Killed at iteration 6 of 8, after the checkpoint of iteration 4, and resumed, it equals a run never stopped."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    few = [*FEW, *(["--interval", 0, "inf"] if script == "cfg_afhq" else [])]
    train = [*TINY, "--patch", patch, "--iters", 8, "--save", 4, *few]
    main(script, "--train", "--out", straight, *train)
    said = capsys.readouterr().out.strip().splitlines()[-1]

    module, count = importlib.import_module(script), []
    real = module.loss

    def loss(*args, **options):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return real(*args, **options)
    with monkeypatch.context() as patch_loss:
        patch_loss.setattr(module, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            main(script, "--train", "--out", killed, *train)
    assert saved(killed)["iter"] == 4
    torch.manual_seed(123)                       # chance elsewhere in between must not matter
    torch.rand(5)
    main(script, "--resume", "--out", killed, "--data", "drawn", "--device", "cpu", "--dtype", "fp32", *few)      # the rest is in the file
    same(saved(straight), saved(killed))

    kept = saved(straight)
    assert kept["script"] == script and kept["iter"] == 8 and kept["names"] == ["floppy", "pointed", "striped"]
    assert kept["net"]["patch"] == patch and kept["net"]["size"] == 16
    assert kept["method"] == dict(schedule="cosine", predict="v", weight="min-snr", T=1000)
    flags = dict(iters=8, save=4, batch=4, lr=0.05, ema=0.9995, loss="l2", seed=0)
    assert kept["flags"] == flags | ({"drop": 0.1} if script == "cfg_afhq" else {})
    assert sorted(p.name for p in straight.iterdir() if p.is_file()) == [
        "forward.png", "log.csv", "loss.png", "model.pt", "samples.png", "samples_000004.png", "samples_000008.png"]
    assert np.array_equal(pixels(straight / "samples_000008.png"), pixels(killed / "samples_000008.png"))
    with open(straight / "log.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["iteration", "loss", "images_per_s"] and [r[0] for r in rows[1:]] == ["4", "8"]

    # what was sampled: equal from equal weights; named and counted in the last line; stamped with command and seed
    files = sorted(p.relative_to(straight) for p in (straight / "png").rglob("*.png"))
    assert len(files) == (6 if script == "cfg_afhq" else 2)
    for path in files:
        assert np.array_equal(pixels(straight / path), pixels(killed / path))
    pictures, steps, nfe, seconds = re.fullmatch(
        rf"{re.escape(str(straight / 'samples.png'))}: (\d+) pictures, (\d+) steps, NFE (\d+), ([\d.]+) s", said).groups()
    assert (int(pictures), int(steps), int(nfe)) == (len(files), 3, 6 if script == "cfg_afhq" else 3)
    for path in [*files, "samples.png", "loss.png", "forward.png"]:
        with Image.open(straight / path) as file:
            assert file.text["seed"] == "0" and file.text["command"].startswith("python ")


def test_forward_picture_goes_from_a_face_to_noise(tmp_path, no_figures):
    main("ddpm_afhq", "--train", "--out", tmp_path, *TINY, "--iters", 1, "--n", 1, "--steps", 1)
    grid = pixels(tmp_path / "forward.png")
    assert grid.shape == (4 * 18 + 2, 11 * 18 + 2, 3)           # four faces at t = 0, 100, ... 1000
    faces = common.drawn_faces(60, 16, 0)[0]
    assert np.array_equal(grid[2:18, 2:18], faces[0].permute(1, 2, 0).numpy())
    last = grid[2:18, 10 * 18 + 2:10 * 18 + 18] / 127.5 - 1
    assert abs(last.mean()) < 0.15 and 0.6 < last.std() < 0.9   # N(0, 1), clipped


def test_average_of_the_weights_and_rate_of_the_first_step(tmp_path, no_figures):
    """One iteration by hand: the same start from the seed; Muon's and Adam's first steps; the average's ramp."""
    import ddpm_afhq as ddpm
    main("ddpm_afhq", "--train", "--out", tmp_path, *TINY, "--seed", 7, "--iters", 1, "--n", 1, "--steps", 1)
    torch.manual_seed(7)
    start = ddpm.UNet(size=16, channels=3, ch=8, mult=[1, 2], blocks=1, attn=[8], dropout=0.1).state_dict()
    kept = saved(tmp_path)
    rate = 0.05 / 100                                           # warm-up: 1 / 100 of --lr; iteration 1 of 1 isn't decayed below it
    for name, w in kept["model"].items():
        step = w - start[name] * (1 - 0.01 * rate * (w.ndim > 1))
        if w.ndim > 1 and step.any():                           # a layer after one that is still 0 has no gradient yet
            longest = 0.2 * max(len(w), w[0].numel()) ** 0.5 * rate
            assert torch.linalg.matrix_norm(step.flatten(1), 2).item() == pytest.approx(longest, rel=0.35), name
        assert step.abs().max().item() <= (rate * 1.001 if w.ndim == 1 else longest if step.any() else 0)
        torch.testing.assert_close(kept["ema"][name], torch.lerp(start[name], w, 1 - 2 / 11), rtol=1e-5, atol=1e-8)
    assert (kept["model"]["conv_out.bias"] - start["conv_out.bias"]).abs().min().item() == pytest.approx(rate, rel=1e-3)


def test_learning_rate_warms_up_and_decays(tmp_path, no_figures):
    """min(1, it / 100, (iters + 1 - it) / (0.4 iters)) of --lr: at the end of 40 iterations the decay is the least."""
    main("ddpm_afhq", "--train", "--out", tmp_path, *TINY, "--iters", 40, "--n", 1, "--steps", 1)
    assert saved(tmp_path)["opt"]["param_groups"][0]["lr"] == pytest.approx(0.05 / 16, rel=1e-9)


def test_training_starts_from_weights(weights, tmp_path, no_figures):
    """--train --ckpt FILE: the first step of a small --lr leaves them nearly where they were; iterations count from 1."""
    start = weights / "ddpm_afhq.pt"
    main("ddpm_afhq", "--train", "--ckpt", start, "--out", tmp_path, *DATA, "--lr", 1e-6, "--iters", 2, "--n", 1, "--steps", 1)
    kept, given = saved(tmp_path), torch.load(start, weights_only=True)
    assert kept["iter"] == 2 and kept["net"] == given["net"] and kept["names"] == ["floppy", "pointed", "striped"] != given["names"]
    for name, w in given["ema"].items():
        torch.testing.assert_close(kept["model"][name], w.float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(kept["ema"][name], w.float(), rtol=0, atol=1e-6)


def test_fewer_levels(tmp_path, capsys, no_figures):
    """--T 20, AI504's question in small: the checkpoint remembers it, and sampling takes no more steps than levels."""
    main("ddpm_afhq", "--train", "--out", tmp_path, *TINY, "--T", 20, "--iters", 1, "--n", 1)
    assert "20 steps, NFE 20" in capsys.readouterr().out
    main("ddim_afhq", "--ckpt", tmp_path / "model.pt", "--out", tmp_path / "ddim", "--n", 1, "--device", "cpu")
    assert "20 steps, NFE 20" in capsys.readouterr().out


# ---------------------------------------------------------------- sampling

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """For each script a network of 16 x 16 pictures that is drawn at random, its zero layers too; kept in fp16."""
    folder = tmp_path_factory.mktemp("weights")
    for script in SCRIPTS:
        config = dict(size=16, channels=3, patch=2, ch=8, mult=[1, 2], blocks=1, attn=[4], dropout=0.0)
        config |= {"classes": 3} if script == "cfg_afhq" else {}
        torch.manual_seed(0)
        net = importlib.import_module(script).Network(**config)
        for p in net.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
        torch.save(dict(script=script, net=config, method=dict(schedule="cosine", predict="v", weight="min-snr"), iter=1,
                        names=["cat", "dog", "wild"], ema={k: v.half() for k, v in net.state_dict().items()}), folder / f"{script}.pt")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_picture_i_is_the_same_for_any_number_and_its_seed_is_seed_plus_i(script, weights, tmp_path):
    def run(name, *flags):
        main(script, "--ckpt", weights / f"{script}.pt", "--out", tmp_path / name, "--steps", 4, "--device", "cpu", "--dtype", "fp32", *flags)
        return {p.relative_to(tmp_path / name / "png").as_posix(): pixels(p) for p in (tmp_path / name / "png").rglob("*.png")}
    extra = ["--solver", "ddpm"] if script == "cfg_afhq" else ["--eta", 1] if script == "ddim_afhq" else []
    many, few, later = run("many", "--n", 66, *extra), run("few", "--n", 2, *extra), run("later", "--n", 2, "--seed", 64, *extra)
    assert len(many) == 66 * len(few) // 2
    folders = ["cat/", "dog/", "wild/"] if script == "cfg_afhq" else [""]
    for folder in folders:
        for i in range(2):
            assert abs(many[f"{folder}{i:06d}.png"] - few[f"{folder}{i:06d}.png"]).max() <= 1
            assert abs(many[f"{folder}{64 + i:06d}.png"] - later[f"{folder}{i:06d}.png"]).max() <= 1
        assert abs(few[f"{folder}000000.png"] - few[f"{folder}000001.png"]).max() > 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_sampling_that_is_interrupted_leaves_the_pictures_of_the_last_run(script, weights, tmp_path, monkeypatch):
    flags = ["--ckpt", weights / f"{script}.pt", "--out", tmp_path, "--device", "cpu", *FEW]
    main(script, *flags)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.png")}

    def interrupted(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(importlib.import_module(script), "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(script, *flags, "--seed", 9)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.png")} == before and len(before) > 2


def test_two_kinds_of_script_share_one_checkpoint(weights, tmp_path):
    for script, other in (("ddpm_afhq", "ddim_afhq"), ("ddim_afhq", "ddpm_afhq")):
        main(script, "--ckpt", weights / f"{other}.pt", "--out", tmp_path, *FEW, "--device", "cpu")
    main("ddim_afhq", "--ckpt", weights / "ddpm_afhq.pt", "--out", tmp_path / "a", "--n", 3, "--steps", 5, "--eta", 1, "--dtype", "fp32", "--device", "cpu")
    main("ddpm_afhq", "--ckpt", weights / "ddpm_afhq.pt", "--out", tmp_path / "b", "--n", 3, "--steps", 5, "--dtype", "fp32", "--device", "cpu")
    assert abs(pixels(tmp_path / "a" / "samples.png") - pixels(tmp_path / "b" / "samples.png")).max() <= 1


def test_checkpoint_in_out_comes_before_the_shipped_one(weights, tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes((weights / "ddpm_afhq.pt").read_bytes())
    main("ddpm_afhq", "--out", tmp_path, "--n", 1, "--steps", 1, "--device", "cpu")
    assert pixels(tmp_path / "png" / "000000.png").shape == (16, 16, 3)


def test_extras_of_ddpm(weights, tmp_path, capsys):
    Image.new("RGB", (40, 30), (200, 60, 20)).save(tmp_path / "cat.png")
    base = ["--ckpt", weights / "ddpm_afhq.pt", "--out", tmp_path, "--device", "cpu", "--dtype", "fp32", "--n", 3]
    main("ddpm_afhq", *base, "--image", tmp_path / "cat.png", "--strength", 0.005, "--steps", 250, "--gif")
    assert "3 pictures, 5 steps, NFE 5" in capsys.readouterr().out              # 5 levels: no more steps than that
    grid = pixels(tmp_path / "samples.png")
    assert grid.shape == (16 + 4, 4 * 18 + 2, 3) and grid[10, 10].tolist() == [200, 60, 20]
    assert abs(pixels(tmp_path / "png" / "000002.png") - [200, 60, 20]).mean() < 20       # hardly noised, hardly changed
    with Image.open(tmp_path / "samples.gif") as gif:
        assert gif.n_frames == 6
    main("ddpm_afhq", *base, "--image", tmp_path / "cat.png", "--strength", 1, "--steps", 4)
    assert abs(pixels(tmp_path / "png" / "000002.png") - [200, 60, 20]).mean() > 30
    small = pixels(tmp_path / "png" / "000000.png")
    main("ddpm_afhq", *base, "--steps", 4, "--variance", "large", "--no-clip")
    assert (pixels(tmp_path / "png" / "000000.png") != small).any()


def test_extras_of_ddim(weights, tmp_path, capsys):
    base = ["--ckpt", weights / "ddim_afhq.pt", "--out", tmp_path, "--device", "cpu", "--dtype", "fp32", "--n", 2, "--steps", 4]
    main("ddim_afhq", *base)
    plain = [pixels(tmp_path / "png" / f"00000{i}.png") for i in range(2)]
    main("ddim_afhq", *base, "--interpolate")
    assert "16 pictures" in capsys.readouterr().out.splitlines()[-1]
    for i in range(2):                                                                  # row i begins at picture i's noise
        assert abs(pixels(tmp_path / "png" / f"{8 * i:06d}.png") - plain[i]).max() <= 1
    row = [pixels(tmp_path / "png" / f"{i:06d}.png") for i in range(8)]
    assert all(abs(a - b).max() > 5 for a, b in zip(row, row[1:], strict=False)) and abs(row[7] - plain[1]).max() > 50
    Image.new("RGB", (40, 30), (200, 60, 20)).save(tmp_path / "cat.png")
    main("ddim_afhq", *base[:-1], 200, "--image", tmp_path / "cat.png")
    assert "200 steps, NFE 400" in capsys.readouterr().out
    assert pixels(tmp_path / "samples.png").shape == (16 + 4, 3 * 18 + 2, 3)
    assert (pixels(tmp_path / "samples.png")[2:18, 2:18] == [200, 60, 20]).all()         # the picture, its noise, the picture again
    assert [p.name for p in (tmp_path / "png").iterdir()] == ["000000.png"]
    assert abs(pixels(tmp_path / "png" / "000000.png") - [200, 60, 20]).mean() < 15       # there and back


def test_extras_of_cfg(weights, tmp_path, capsys):
    base = ["--ckpt", weights / "cfg_afhq.pt", "--out", tmp_path, "--device", "cpu", "--dtype", "fp32", "--n", 2, "--interval", 0, "inf"]
    for solver, steps in (("dpm2", 5), ("dpm++2m", 4), ("dpm1", 1), ("ddpm", 2), ("ddim", 3)):
        main("cfg_afhq", *base, "--solver", solver, "--steps", steps, "--label", "dog")
        assert f"2 pictures, {steps} steps, NFE {2 * steps}," in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "png").iterdir()] == ["dog"]
    shown = {}
    for solver, grid in (("dpm++2m", None), ("dpm++2m", "karras"), ("dpm++2m", "uniform"), ("ddim", None), ("ddim", "uniform"), ("ddim", "karras")):
        main("cfg_afhq", *base, "--solver", solver, "--steps", 3, "--label", "dog", *(["--spacing", grid] if grid else []))
        shown[solver, grid] = pixels(tmp_path / "png" / "dog" / "000000.png")
    assert (shown["dpm++2m", None] == shown["dpm++2m", "karras"]).all() and (shown["ddim", None] == shown["ddim", "uniform"]).all()
    assert (shown["dpm++2m", "uniform"] != shown["dpm++2m", None]).any() and (shown["ddim", "karras"] != shown["ddim", None]).any()
    main("cfg_afhq", *base, "--steps", 2, "--scale", 0, 1, 3)
    assert "14 pictures, 2 steps, NFE 2 2 4," in capsys.readouterr().out                # scale 0 knows no label: one row
    names = ["scale0/unlabelled", *[f"scale{s}/{c}" for s in (1, 3) for c in ("cat", "dog", "wild")]]
    rows = {name: pixels(tmp_path / "png" / name / "000000.png") for name in names}
    assert pixels(tmp_path / "samples.png").shape == (7 * 18 + 2, 2 * 18 + 2, 3)
    assert min(abs(rows[a] - rows[b]).max() for a in names for b in names if a < b) > 1
    main("cfg_afhq", *base, "--steps", 2, "--label", "3", "--scale", 3)
    assert abs(pixels(tmp_path / "png" / "wild" / "000000.png") - rows["scale3/wild"]).max() <= 1      # label by number


# ---------------------------------------------------------------- two processes

def test_two_processes_train_one_network(tmp_path):
    """torchrun with gloo: it trains, it ends, both hold the same weights to the bit, and one of them samples."""
    code = f"""
import sys, torch, common, ddpm_afhq
real, step = common.drawn_faces, common.Run.step
common.drawn_faces = lambda n, size, seed: real(60, size, seed)
def watched(run, it, L, preview=None):
    torch.save([L.item(), run.state[0].state_dict(), run.state[1].state_dict()], {str(tmp_path)!r} + f"/rank{{run.args.rank}}.pt")
    step(run, it, L, preview)
common.Run.step = watched
ddpm_afhq.main(sys.argv[1:])
"""
    (tmp_path / "go.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                           str(tmp_path / "go.py"), "--train", "--out", str(tmp_path / "two"), *TINY, "--iters", "6", "--save", "3", "--steps", "1", "--n", "1"],
                          env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("samples.png") == 1                # one process samples
    kept = saved(tmp_path / "two")
    (loss0, *first), (loss1, *second) = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert kept["iter"] == 6 and loss0 != loss1                 # each has pictures and noise of its own,
    torch.manual_seed(0)
    start = importlib.import_module("ddpm_afhq").Network(**kept["net"]).state_dict()
    for a, b, c in zip(first, second, (kept["model"], kept["ema"]), strict=True):
        assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in c)       # and what they learn is one
    assert max((kept["model"][k] - start[k]).abs().max().item() for k in start) > 1e-3
