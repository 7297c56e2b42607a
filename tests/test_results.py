"""bench/results.py: rows are what cfg_afhq.py and fid.py say, are stored, and are measured again for other weights."""
import csv
import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cfg_afhq
import common
import fid
from bench import results, speed, training

ROOT = pathlib.Path(__file__).parent.parent
TINY = dict(size=64, channels=3, patch=8, ch=8, mult=[1, 2], blocks=1, attn=[], dropout=0.0, classes=3)
TINY_FLAGS = ["--patch", "8", "--ch", "8", "--mult", "1", "2", "--blocks", "1", "--attn", "--batch", "4"]


def checkpoint(path, seed=0, it=7, **changes):
    torch.manual_seed(seed)
    network = cfg_afhq.Network(**TINY)
    for p in network.parameters():                     # a new network is 0; this one is not
        p.data += 0.05 * torch.randn(p.shape)
    torch.save(dict(script="cfg_afhq", net=TINY, names=["cat", "dog", "wild"], iter=it, log=[], ema=network.state_dict(),
                    method=dict(schedule="cosine", predict="v", weight="min-snr", T=1000)) | changes, path)
    return path


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 5)):
        for name in ("cat", "dog", "wild"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def run(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        results.main([*map(str, flags), "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu", "--dtype", "fp32", "--n", "4"])
        return capsys.readouterr().out
    return call


def arguments(tmp_path, *flags):
    return common.prepare(results.parse_args([*flags, "--device", "cpu", "--dtype", "fp32", "--out", str(tmp_path / "out")]))


def test_a_row_is_what_the_scripts_say(run, data, tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt")
    said = run("seen", "--ckpts", path, "--seed", "1", "--seeds", "1")
    with open(tmp_path / "out" / "seen.csv") as file:
        row, = csv.DictReader(file)
    assert int(row["nfe"]) == 20 and int(row["seen"]) == 7 * 32 and f"{path} | 20 | {float(row['fid']):.1f} ± {float(row['fid_se']):.1f}" in said
    cfg_afhq.main(["--ckpt", str(path), "--seed", "10000", "--n", "4", "--steps", "20", "--solver", "dpm++2m", "--scale", "1", "--device", "cpu",
                   "--dtype", "fp32", "--out", str(tmp_path / "cfg")])
    fid.main([str(data), str(tmp_path / "cfg" / "png"), "--mix", "--floor", str(data), "--device", "cpu", "--out", str(tmp_path / "fid")])
    want = json.loads((tmp_path / "fid" / "fid.json").read_text())
    for key, (kind, number) in dict(fid=("fid", "value"), fid_se=("fid", "se"), kid=("kid", "value"), floor=("fid", "floor")).items():
        assert float(row[key]) == pytest.approx(want[kind][number], rel=1e-4), key
    assert (tmp_path / "out" / "seen.png").is_file()


def test_rows_are_stored_and_other_weights_measured_again(run, data, tmp_path, monkeypatch):
    monkeypatch.setitem(results.ROWS, "scales", {"0": ("dpm++2m", 20, 0.0), "2.5": ("dpm++2m", 20, 2.5)})
    made = []
    real = results.faces
    monkeypatch.setattr(results, "faces", lambda model, n, row, device: made.append(row.scale) or real(model, n, row, device))
    path = checkpoint(tmp_path / "a.pt")
    first = run("scales", "--ckpts", path, "--seeds", "2")
    assert made == [0, 2.5, 0, 2.5] and "| scale 0 | 20 |" in first and "| scale 2.5 | 40 |" in first
    assert run("scales", "--ckpts", path, "--seeds", "2").splitlines()[:-1] == first.splitlines()[:-1] and len(made) == 4
    run("scales", "--ckpts", checkpoint(path, seed=1), "--seeds", "1")
    assert len(made) == 6
    Image.new("RGB", (16, 16)).save(data / "val" / "cat" / "0.png")           # other photographs, other numbers
    run("scales", "--ckpts", path, "--seeds", "1", "--only", "0")
    assert len(made) == 7


def test_an_interval_saves_evaluations_and_makes_other_pictures(run, tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    names = "dpm++2m 20 at 8.5, 0.5 to 2", "dpm++2m 20 at 8.5, 0 to inf"
    said = run("intervals", "--ckpts", path, "--seeds", "1", "--only", *names)
    cells = [[cell.strip() for cell in line.split("|")] for line in said.splitlines() if line.startswith("| dpm")]
    assert [c[1] for c in cells] == ["dpm++2m-20, scale 8.5, 0.5 to 2", "dpm++2m-20, scale 8.5, 0 to inf"]
    alpha_bar = cfg_afhq.schedule()
    ratios = [((1 - ab) / ab).sqrt() for ab in (cfg_afhq.alpha_bar_at(alpha_bar, t) for t in cfg_afhq.levels_for("dpm++2m", alpha_bar, 20)[:-1])]
    assert [int(c[2]) for c in cells] == [20 + sum(0.5 < float(r) <= 2 for r in ratios), 40] and cells[0][3] != cells[1][3]
    assert (tmp_path / "out" / "intervals-only.png").is_file()


def test_checkpoints_of_one_file_name_are_two_rows(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    said = run("seen", "--ckpts", checkpoint(tmp_path / "a" / "m.pt"), checkpoint(tmp_path / "b" / "m.pt", 1, it=9, flags={"batch": 10}), "--seeds", "2")
    rows = [line.split("|") for line in said.splitlines() if "m.pt" in line and line.startswith("|")]
    assert len(rows) == 2 and rows[0][3] != rows[1][3]
    with open(tmp_path / "out" / "seen.csv") as file:
        assert [int(r["seen"]) for r in csv.DictReader(file)] == [224, 224, 90, 90]


def test_only_takes_the_rows_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(results.ROWS, "solvers", {k: (s, 2, 1.0) for k, (s, n, _) in results.ROWS["solvers"].items()})
    path = checkpoint(tmp_path / "a.pt")
    said = run("solvers", "--ckpts", path, "--seeds", "1", "--only", "ddpm 1000", "dpm++2m uniform 10")
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert rows == ["what", "ddpm-2", "dpm++2m uniform-2"] and not list((tmp_path / "out").glob("*-faces.png"))


def test_solvers_draw_their_faces(run, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "SOLVERS", {"ddim": [10, 20, 50], "dpm++2m": [10, 20, 50]})
    monkeypatch.setitem(results.ROWS, "solvers", {f"{s} {n}": (s, n, 1.0) for s in results.SOLVERS for n in (10, 20, 50)})
    run("solvers", "--ckpts", checkpoint(tmp_path / "a.pt"), "--seeds", "1")
    with Image.open(tmp_path / "out" / "solvers-faces.png") as file:
        assert file.width > 700 and file.height > 100


def test_copies_are_found(run, data, tmp_path, monkeypatch):
    x, _, _ = common.load_images(data, "train", 64)
    copied = torch.cat([x[:11], x[11:12].flip(3)])
    monkeypatch.setattr(results, "faces", lambda model, n, row, device: copied if row.scale == 1 else 255 - x[:12])
    said = run("copies", "--ckpts", checkpoint(tmp_path / "a.pt"))
    with open(tmp_path / "out" / "copies.csv") as file:
        rows = {(r["set"], r["distance"]): r for r in csv.DictReader(file)}
    assert float(rows["samples, scale 1", "pixels"]["p95"]) < 1 < float(rows["samples, scale 3", "pixels"]["least"])
    assert float(rows["held-out photographs", "pixels"]["least"]) > 10 and "| held-out photographs |" in said
    with Image.open(tmp_path / "out" / "copies.png") as file:
        assert file.size == (12 * 66 + 2, 3 * 66 + 2)


def test_nearest_is_the_least_of_all_distances():
    a, b = torch.randn(5, 3), torch.randn(7, 3)
    want, number = (a[:, None] - b).square().sum(2).sqrt().min(1)
    got = results.nearest(a, b, chunk=3)
    torch.testing.assert_close(got[0], want)
    assert torch.equal(got[1], number)


def test_unlabelled_pictures_each_have_their_own_noise(tmp_path):
    model = results.load_model(arguments(tmp_path, "scales"), checkpoint(tmp_path / "a.pt"))
    x = results.faces(model, 2, results.Row("", "ddim", 2, 0.0, 0), "cpu")
    assert len(x) == 6 and len(torch.unique(x, dim=0)) == 6
    y = results.faces(model, 2, results.Row("", "ddim", 2, 1.0, 1), "cpu")
    assert len(y) == 6 and not any((a == b).all() for a in x for b in y)


def test_a_network_without_labels_has_the_row_of_scale_0(run, tmp_path, capsys):
    labelled = checkpoint(tmp_path / "labelled.pt")
    saved, net = torch.load(labelled), {k: v for k, v in TINY.items() if k != "classes"}
    saved["ema"]["time.2.bias"] += saved["ema"].pop("label.weight")[0]             # the empty label, told to every picture
    torch.save(saved | dict(script="ddpm_afhq", net=net), tmp_path / "unlabelled.pt")
    without, row = [run("scales", "--only", "0", "--seeds", "1", "--ckpts", tmp_path / name) for name in ("unlabelled.pt", "labelled.pt")]
    fid_of = [float(re.search(r"scale 0 \| 20 \| ([\d.]+) ±", text)[1]) for text in (without, row)]
    assert fid_of[0] == pytest.approx(fid_of[1], rel=1e-4)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("scales", "--only", "1", "--ckpts", tmp_path / "unlabelled.pt")
    assert "without labels" in capsys.readouterr().err


def test_other_weights_and_another_precision_have_another_hash(tmp_path):
    fp32, bf16 = (common.prepare(results.parse_args(["scales", "--device", "cpu", "--dtype", d, "--out", str(tmp_path / "out")])) for d in ("fp32", "bf16"))
    paths = checkpoint(tmp_path / "a.pt"), checkpoint(tmp_path / "b.pt", seed=1), checkpoint(tmp_path / "c.pt", it=8)
    a, b, c = (results.load_model(fp32, path).hash for path in paths)
    assert len({a, b, results.load_model(bf16, paths[0]).hash}) == 3 and a == c            # a longer count alone changes no picture


# ---------------------------------------------------------------- training

def test_every_row_of_mattered_changes_something_that_exists_and_no_two_are_alike():
    plain = vars(cfg_afhq.parse_args([]))
    seen = []
    for name, change in results.CHANGES.items():
        next(common.batches(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, 1, 2]), 2, **change.batches))
        flags = {k: v for k, v in vars(cfg_afhq.parse_args(change.flags)).items() if v != plain[k] and k != "typed"}
        found = flags, change.batches, change.ema
        assert (found == ({}, {}, True)) == (name == "the defaults") and found not in seen, name
        assert sum(map(bool, (flags, change.batches, not change.ema))) <= 1, name
        seen.append(found)


def prepared(out, data, *flags):
    flags = ["--data", str(data), "--out", str(out), "--device", "cpu", "--dtype", "fp32", *TINY_FLAGS, *flags]
    return common.prepare(cfg_afhq.parse_args(flags), cfg_afhq.TRAINED_BY)


def test_training_is_that_of_the_script_to_the_bit(tmp_path, data, monkeypatch):
    """training.train repeats cfg_afhq.train, so that its batches can be changed; with default ones nothing differs."""
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, largest: clip(p, 0.01 * largest))   # else it never bites here
    flags = ["--iters", "12", "--save", "5", "--lr", "2e-3", "--ema", "0.9"]
    args = prepared(tmp_path / "script", data, "--train", *flags)
    cfg_afhq.train(args, cfg_afhq.schedule(args.schedule, args.T))
    training.train(prepared(tmp_path / "bench", data, "--train", *flags))
    a, b = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("script", "bench"))
    for kind in ("model", "ema"):
        assert all(torch.equal(a[kind][k], b[kind][k]) for k in a[kind]) and a[kind].keys() == b[kind].keys()
    assert not all(torch.equal(a["model"][k], a["ema"][k]) for k in a["model"])
    assert {k: a[k] for k in ("script", "net", "names", "method", "flags", "iter")} == {k: b[k] for k in ("script", "net", "names", "method", "flags", "iter")}
    training.train(prepared(tmp_path / "unmirrored", data, "--train", *flags), mirror=False)
    training.train(prepared(tmp_path / "uneven", data, "--train", *flags), even=False)
    others = [torch.load(tmp_path / name / "model.pt", weights_only=True)["model"]["conv_in.weight"] for name in ("unmirrored", "uneven")]
    assert len({tuple(w.flatten().tolist()) for w in (a["model"]["conv_in.weight"], *others)}) == 3


def test_a_change_of_the_batches_reaches_the_pictures(tmp_path, data, monkeypatch):
    """Not mirrored: every picture of a batch is one of the photographs. As they come: labels follow the folders' sizes."""
    for i in range(4, 9):
        (data / "train" / "wild" / f"{i}.png").unlink()
    for name in ("cat", "dog"):
        for i in range(9, 40):
            Image.open(data / "train" / name / f"{i % 9}.png").save(data / "train" / name / f"{i}.png")
    x, _, _ = common.load_images(data, "train", 64)
    photographs = {p.numpy().tobytes() for p in x}
    fed = []
    monkeypatch.setattr(training, "step", lambda args, it, network, ema, optimizer, denoiser, alpha_bar, x0, y: fed.append((x0, y)) or torch.ones(()))
    found = {}
    for batches in ({}, {"mirror": False}, {"even": False}):
        fed.clear()
        out = tmp_path / "-".join(batches or ["default"])
        training.train(prepared(out, data, "--train", "--iters", "60"), **batches)
        pictures = [common.to_uint8(p).numpy().tobytes() in photographs for x0, _ in fed for p in x0]
        wild = torch.cat([y for _, y in fed]).eq(3).double().mean().item()
        found[out.name] = np.mean(pictures), wild
    assert 0.3 < found["default"][0] < 0.7 and found["mirror"][0] == 1 and 0.3 < found["even"][0] < 0.7
    assert found["default"][1] > 0.2 > 0.12 > found["even"][1]                # 1 / 3, and 4 of 84


def test_mattered_trains_each_row_with_its_change_alone(run, tmp_path, monkeypatch):
    change = results.Change
    monkeypatch.setitem(results.ROWS, "mattered", {"the defaults": change(TINY_FLAGS), "no EMA": change(TINY_FLAGS, ema=False),
                                                   "twice": change([*TINY_FLAGS, "--lr", "4.8e-3"]),
                                                   "not mirrored": change(TINY_FLAGS, {"mirror": False})})
    trained, real = [], training.train
    monkeypatch.setattr(training, "train", lambda args, **batches: trained.append((args.lr, args.resume, batches)) or real(args, **batches))
    said = run("mattered", "--iters", "3", "--seeds", "1")
    assert trained == [(2.4e-3, False, {}), (4.8e-3, False, {}), (2.4e-3, False, {"mirror": False})]     # none for "no EMA"
    folder = tmp_path / "out" / "trained" / "3"
    weights = {p.parent.name: torch.load(p, weights_only=True) for p in folder.glob("*/model.pt")}
    assert set(weights) == {"the_defaults", "twice", "not_mirrored"} and {w["iter"] for w in weights.values()} == {3}
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ")}
    assert set(rows) == {"what", *results.ROWS["mattered"]} and len({r.split("|")[3] for r in rows.values()}) >= 3
    last = torch.load(folder / "the_defaults" / "last.pt", weights_only=True)
    assert all(torch.equal(last["ema"][k], v) for k, v in weights["the_defaults"]["model"].items())
    first = {name: w["model"]["conv_in.weight"] for name, w in weights.items()}
    assert not torch.equal(first["the_defaults"], first["twice"]) and not torch.equal(first["the_defaults"], first["not_mirrored"])
    run("mattered", "--iters", "3", "--seeds", "1")
    assert len(trained) == 3 and (tmp_path / "out" / "mattered-faces.png").is_file()   # and not again
    run("mattered", "--iters", "2", "--seeds", "1", "--only", "twice")
    assert len(trained) == 4 and (tmp_path / "out" / "mattered-only.csv").is_file()    # but for another number of steps


def test_a_training_that_was_stopped_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setitem(results.ROWS, "mattered", {"tiny": results.Change(TINY_FLAGS)})
    flags = "mattered", "--data", str(data), "--iters", "5"
    want = torch.load(results.trained(arguments(tmp_path / "a", *flags), "tiny"), weights_only=True)
    step, steps = training.step, []

    def interrupted(args, it, *rest):
        if it == 4 and not steps:
            steps.append(it)
            raise KeyboardInterrupt
        return step(args, it, *rest)

    monkeypatch.setattr(training, "step", interrupted)
    monkeypatch.setitem(results.ROWS, "mattered", {"tiny": results.Change([*TINY_FLAGS, "--save", "2"])})
    with pytest.raises(KeyboardInterrupt):
        results.trained(arguments(tmp_path / "b", *flags), "tiny")
    path = results.trained(arguments(tmp_path / "b", *flags), "tiny")
    got = torch.load(path, weights_only=True)
    assert got["iter"] == 5 and all(torch.equal(got["ema"][k], v) for k, v in want["ema"].items())


# ---------------------------------------------------------------- input, commands

@pytest.mark.parametrize(("flags", "word"), [(("--n", "10"), "9 photographs of a class in train"), (("--ckpts", "two.pt"), "knows")])
def test_counts_and_classes_are_looked_at_first(flags, word, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "two.pt", names=["cat", "dog", "fox"])
    monkeypatch.setattr(results, "faces", None)
    with pytest.raises(SystemExit):
        results.main(["scales", "--data", str(data), "--device", "cpu", "--n", "4", *flags])
    said = capsys.readouterr().err.strip()
    assert word in said and len(said.splitlines()) == 1


def test_another_size_is_refused(tmp_path, capsys):
    path = checkpoint(tmp_path / "a.pt", net=TINY | {"size": 32})
    with pytest.raises(SystemExit):
        results.load_model(arguments(tmp_path, "scales"), path)
    assert "side 32" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("seen",), ("scales", "--only", "99"), ("copies", "--only", "x"), ("mattered", "--ckpts", "a.pt"), ("scales", "--ckpts", "a.pt", "b.pt"), ("scales", "--ckpts", "none.pt", "--data", "drawn"), ("scales", "--n", "1"), ("scales", "--n", "3334"), ("scales", "--seeds", "0"), ("solvers", "--data", "nowhere")])
def test_wrong_input_is_one_sentence(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "photographs", lambda *a: (torch.zeros(99, 3, 64, 64, dtype=torch.uint8), np.array(["floppy"] * 99)))
    monkeypatch.setattr(fid, "cached_features", lambda *a: (np.zeros((99, 4)), np.zeros((99, 3))))
    with pytest.raises(SystemExit) as end:
        results.main([*flags] if "--data" in flags else [*flags, "--data", "drawn"])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1 and said[0].endswith((".", ")"))


SHOWN = [*re.findall(r"python (bench/\w+\.py)([^`\n|#]*)", (ROOT / "RESULTS.md").read_text() + (ROOT / "README.md").read_text()),
         *re.findall(r"python (bench/\w+\.py)((?: [^ \n]+)*)", results.__doc__ + speed.__doc__)]


@pytest.mark.parametrize(("script", "words"), sorted(set(SHOWN)))
def test_commands_that_are_shown_can_be_typed(script, words):
    module = {"bench/results.py": results, "bench/speed.py": speed}.get(script)
    if module:
        module.parse_args(shlex.split(words))
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("script", ["results", "speed"])
def test_scripts_run_from_the_root_and_from_elsewhere(script, tmp_path):
    folder, path = (ROOT, "bench/results.py") if script == "results" else (tmp_path, str(ROOT / "bench" / "speed.py"))
    done = subprocess.run([sys.executable, path, "--help"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "--only" in done.stdout, done.stderr


def test_the_page_of_results_opens_with_its_warning():
    page = (ROOT / "RESULTS.md").read_text()
    assert page.split("\n\n")[1].startswith("**No number on this page is an AFHQ number.**")
