"""bench/train_classifier.py: what it does to pictures, that fid.py reads what it writes, and its study of damage."""
import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import fid
from bench import train_classifier


def test_damage_says_what_it_did():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 64, 64) * 2 - 1
    y = torch.arange(64) % 3 + 1
    xt, amount = train_classifier.damage(x, y)
    assert amount.shape == (64, 4) and ((amount > 0).sum(1) <= 1).all()
    whole = (amount == 0).all(1)
    assert 15 < whole.sum() < 50
    assert (xt[whole] - x[whole]).abs().max() < 1e-5
    assert ((xt - x)[~whole].abs().mean((1, 2, 3)) > 1e-4).float().mean() > 0.9
    same = []
    for i in range(64):
        if amount[i, 1] > 0:
            assert (xt - x)[i].std() == pytest.approx(0.2 * amount[i, 1].item(), rel=0.05)
        if amount[i, 3] > 0:                      # with another face, most often of the same class
            other = x[i] + (xt[i] - x[i]) / (0.5 * amount[i, 3])
            near = (x - other).abs().mean((1, 2, 3)).argmin()
            assert (x[near] - other).abs().max() < 1e-3 and near != i
            same.append(bool(y[near] == y[i]))
    assert np.mean(same) > 0.5


def test_reflected_places_are_read_as_by_padding_mode_reflection():
    torch.manual_seed(0)
    x, grid = torch.rand(4, 3, 64, 64), torch.rand(4, 64, 64, 2) * 6 - 3
    want = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    got = F.grid_sample(x, train_classifier.reflected(grid, 64), align_corners=False)     # zeros outside: never read
    torch.testing.assert_close(got, want, rtol=0, atol=3e-5)


def test_augment_asks_for_no_padding_mode(monkeypatch):
    """Apple's MPS has kernels for the default padding of grid_sample only."""
    real, asked = F.grid_sample, []
    monkeypatch.setattr(train_classifier.F, "grid_sample", lambda x, grid, **how: asked.append(how) or real(x, grid, **how))
    out = train_classifier.augment(torch.rand(8, 3, 64, 64))
    assert out.shape == (8, 3, 64, 64) and asked == [{"align_corners": False}]


def data(root, n=24):
    for split, seed in (("train", 0), ("val", 1)):
        x, y, names = common.drawn_faces(n, 64, seed)
        for i in range(n):
            common.save_uint8(x[i], root / split / names[y[i] - 1] / f"{i}.png")
    return root


def test_trains_and_fid_reads_it(tmp_path, capsys):
    root, out = data(tmp_path / "data"), tmp_path / "out"
    train_classifier.main(["--data", str(root), "--out", str(out), "--iters", "2", "--batch", "8", "--device", "cpu", "--dtype", "fp32"])
    said = capsys.readouterr().out
    assert "24 recognised" in said.replace("of 24 recognised", "24 recognised") and "8 floppy (" in said and str(out / "model.pt") in said
    state = torch.load(out / "model.pt", weights_only=True)
    assert {v.dtype for v in state["model"].values()} == {torch.float16, torch.int64}
    net = fid.load_extractor("faces", out / "model.pt")
    assert net.classes == ["floppy", "pointed", "striped"] == state["names"]
    x, _, _ = common.load_images(root, "train", 64)
    values, _ = fid.features(x, net)              # centred and scaled by these very photographs
    assert np.abs(values.mean(0)).max() < 0.05 and 0.5 < np.median(values.std(0)) < 1.1


def test_learns(tmp_path):
    """The loss of drawn faces falls within 60 steps."""
    torch.manual_seed(0)
    x, y, _ = common.drawn_faces(300, 64, 0)
    network = fid.FaceNet(3)
    optimizer, batches, losses = torch.optim.AdamW(network.parameters(), 2e-3), common.batches(x, y, 32), []
    for _ in range(60):
        losses.append(train_classifier.loss(network, *next(batches)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses[-10:]).mean() < 0.7 * torch.stack(losses[:10]).mean()


def test_a_loss_that_is_not_finite_ends_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_classifier, "loss", lambda network, x0, y: network.kind.weight.sum() * float("nan"))
    with pytest.raises(SystemExit) as end:
        train_classifier.main(["--data", "drawn", "--out", str(tmp_path), "--iters", "2", "--batch", "4", "--device", "cpu"])
    assert end.value.code == 2 and "iteration 2 " in capsys.readouterr().err and not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("flags", [("--lr", "nan"), ("--lr", "-1"), ("--batch", "0"), ("--iters", "0"), ("--n", "0")])
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as end:
        train_classifier.parse_args(list(flags))
    assert end.value.code == 2 and flags[0] in capsys.readouterr().err


def test_study(tmp_path, capsys):
    out = tmp_path / "out"
    train_classifier.main(["--data", str(data(tmp_path / "data")), "--out", str(out), "--study", "--n", "12", "--draws", "2", "--device", "cpu"])
    assert "12 photographs" in capsys.readouterr().out
    rows = list(csv.DictReader(open(out / "damage.csv")))
    mean = {name: np.mean([float(r["FID"]) for r in rows if r["damage"] == name]) for name in {r["damage"] for r in rows}}
    assert len(rows) == 22 and mean["blur, sd 0.8 px"] > mean["blur, sd 0.5 px"] > mean["nothing (the floor)"]
    assert mean["noise, sd 8 / 255"] > mean["nothing (the floor)"]


def test_runs_from_any_folder(tmp_path):
    """As a program it finds fid.py and common.py, wherever it is called."""
    done = subprocess.run([sys.executable, train_classifier.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "--study" in done.stdout, done.stderr
