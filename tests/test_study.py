"""bench/study.py: the held-out loss against its exact values, a tiny study that is stored and not repeated."""
import csv

import pytest
import torch

import cfg_afhq
import common
from bench import study, training

TINY = ["--size", "16", "--ch", "8", "--mult", "1", "2", "--blocks", "1", "--attn", "--batch", "4"]


def test_held_out_loss_of_a_known_prediction():
    """eps_hat = 0 errs by eps / a: E eps^2 / alpha_bar; eps_hat = eps does not err."""
    alpha_bar, x0 = cfg_afhq.schedule(), torch.rand(40, 3, 16, 16) * 2 - 1
    y = torch.ones(40, dtype=torch.long)
    found = study.held_out(lambda xt, t, y: torch.zeros_like(xt), x0, y, alpha_bar, (50, 700))
    assert found == pytest.approx([1 / float(alpha_bar[t]) for t in (50, 700)], rel=0.02)

    def exact(xt, t, y):
        ab = alpha_bar[t][:, None, None, None].float()
        first = int(seen[int(t[0])])
        seen[int(t[0])] += len(xt)
        return (xt - ab.sqrt() * x0[first:first + len(xt)]) / (1 - ab).sqrt()
    seen = {50: 0, 700: 0}
    assert max(study.held_out(exact, x0, y, alpha_bar, (50, 700))) < 1e-6


def test_a_change_lasts_as_long_as_its_context():
    for change in study.CHANGES.values():
        before = [getattr(owner, name) for owner, name, _ in change.exchanged]
        with study.changed(change):
            assert all(getattr(owner, name) is value for owner, name, value in change.exchanged)
        assert [getattr(owner, name) for owner, name, _ in change.exchanged] == before
        cfg_afhq.parse_args(change.flags)


def test_what_is_exchanged():
    x = torch.randn(2, 5, 3, 3)
    assert study.PixelNorm()(x).square().mean(1).flatten().tolist() == pytest.approx([1.0] * 18, rel=1e-5)


def test_study_trains_once_and_collects(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "CHANGES", {"the defaults": study.Change(TINY), "AdamW": study.CHANGES["AdamW"]._replace(flags=TINY)})
    real, rates = training.step, []
    monkeypatch.setattr(training, "step", lambda args, it, *rest: rates.append(args.iters / it) or real(args, it, *rest))
    drawn = common.drawn_faces
    monkeypatch.setattr(common, "drawn_faces", lambda n, size, seed: drawn(60, size, seed))
    threads = torch.get_num_threads()
    for _ in range(2):
        study.main(["--data", "drawn", "--seconds", "0.5", "--seeds", "1", "--out", str(tmp_path), "--dtype", "fp32"])
    torch.set_num_threads(threads)
    steps = len(rates)
    assert steps >= 4 and max(rates) > 2 and min(rates) < 1.6                  # the decay follows the seconds that are left
    with open(tmp_path / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["change"] for r in rows] == ["the defaults", "AdamW"] and sum(int(r["pictures"]) for r in rows) == 4 * steps
    assert all(0 < float(r["t = 500"]) < 2 for r in rows)
    kept = common.read_checkpoint(tmp_path / "AdamW-0.5-0.pt", ["cfg_afhq"])
    assert cfg_afhq.UNet(**kept["net"]).load_state_dict(kept["ema"]) and kept["names"] == ["floppy", "pointed", "striped"]
    assert "| AdamW | 0 |" in capsys.readouterr().out
