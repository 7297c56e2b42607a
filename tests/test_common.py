"""common.py: pictures, drawn faces, points, distances, flags, the frame of a training, figures, and the download of AFHQ."""
import csv
import hashlib
import http.server
import io
import itertools
import math
import os
import pathlib
import subprocess
import sys
import threading
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import cfg_afhq
import common


def stopped(capsys, call, *words):
    """call() ends the program as a user's error: exit code 2 and one sentence that has the words."""
    with pytest.raises(SystemExit) as end:
        call()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2
    for word in words:
        assert str(word) in said, f"{word!r} is not in {said!r}"


def picture(path, colour=(200, 30, 30), size=(20, 20), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """root/train: 3 cats, 2 dogs in other sizes and formats."""
    root = tmp_path / "photos"
    for i in range(3):
        picture(root / "train" / "cat" / f"{i}.png", (50 * i, 0, 0))
    picture(root / "train" / "dog" / "b.jpg", (0, 200, 0), (30, 25))
    picture(root / "train" / "dog" / "deeper" / "a.jpeg", (0, 100, 0), (40, 60))
    return root


# ---------------------------------------------------------------- reading pictures

def test_load_images_reads_the_layout(photos):
    x, y, names = common.load_images(str(photos), "train", 16)
    assert x.dtype == torch.uint8 and x.shape == (5, 3, 16, 16)
    assert names == ["cat", "dog"] and y.tolist() == [1, 1, 1, 2, 2]
    assert [int(v) for v in x[:3, 0, 0, 0]] == [0, 50, 100]
    assert sorted(int(v) for v in x[3:, 1, 8, 8]) == pytest.approx([100, 200], abs=2)


def test_cache_is_used_until_anything_changes(photos, monkeypatch):
    load = lambda size=16: common.load_images(str(photos), "train", size)      # noqa: E731
    reads = []
    real = common.read_image
    monkeypatch.setattr(common, "read_image", lambda path, size: reads.append(path) or real(path, size))

    def count(want, size=16):
        reads.clear()
        out = load(size)
        assert len(reads) == want
        return out
    first = count(5)
    again = count(0)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]
    assert count(5, 8)[0].shape[-1] == 8
    count(0), count(0, 8)                                                     # two sizes side by side
    picture(photos / "train" / "cat" / "9.png")
    assert len(count(6)[0]) == 6                                              # one more file
    count(0)
    picture(photos / "train" / "cat" / "0.png", (9, 9, 9))
    os.utime(photos / "train" / "cat" / "0.png", ns=(1, 1))
    assert count(6)[0][0, 0, 0, 0] == 9                                       # another content
    (photos / "train" / "dog" / "b.jpg").rename(photos / "train" / "cat" / "b.jpg")
    assert count(6)[1].tolist() == [1, 1, 1, 1, 1, 2]                         # another class
    cache = next(photos.glob(".train-16.pt"))
    cache.write_bytes(cache.read_bytes()[:100])
    count(6)                                                                  # a broken cache is made anew
    count(0)
    assert not list(photos.glob("*tmp*")) and not list(photos.glob(".*tmp*"))


def test_folder_that_can_not_be_written_only_costs_the_cache(photos, monkeypatch, capsys):
    for error in (RuntimeError("Parent directory does not exist."), PermissionError(13, "denied"), OSError(28, "No space left")):
        def refuse(*args, error=error, **options):
            raise error
        monkeypatch.setattr(torch, "save", refuse)
        assert len(common.load_images(str(photos), "train", 16)[0]) == 5
        assert f"no cache written: {error}" in capsys.readouterr().err            # the very reason, not a guess at it
    assert not list(photos.glob(".train*"))


def test_cache_that_is_empty_or_was_left_half_written(photos):
    common.load_images(str(photos), "train", 16)
    cache, stale, busy = photos / ".train-16.pt", photos / ".train-16.pt.tmp123", photos / ".train-16.pt.tmp456"
    for path in (cache, stale, busy):
        path.write_bytes(b"")
    os.utime(stale, times=(time.time() - 7200,) * 2)
    assert len(common.load_images(str(photos), "train", 16)[0]) == 5
    assert cache.stat().st_size > 100 and not stale.exists() and busy.exists()     # busy: another program may be writing it


def test_no_data_and_empty_class(photos, capsys):
    stopped(capsys, lambda: common.load_images(str(photos / "none")), photos / "none", "common.py", "--data drawn")
    stopped(capsys, lambda: common.load_images(str(photos), "val"), photos / "val" / "CLASS", photos / "train")
    (photos / "train" / "wolf").mkdir()
    (photos / "train" / "wolf" / "notes.txt").write_text("no picture")
    stopped(capsys, lambda: common.load_images(str(photos)), photos / "train" / "wolf", ".jpg")


@pytest.mark.parametrize("harm", ["text", "cut", "empty"])
def test_unreadable_picture_is_named_and_left_out_only_if_asked(photos, capsys, harm):
    bad = photos / "train" / "cat" / "0.jpg"
    picture(bad)
    bad.write_bytes({"text": b"no picture", "cut": bad.read_bytes()[:-200], "empty": b""}[harm])
    stopped(capsys, lambda: common.load_images(str(photos), "train", 16), bad, "--skip-bad")
    x, y, names = common.load_images(str(photos), "train", 16, skip_bad=True)
    assert x.shape == (5, 3, 16, 16) and y.tolist() == [1, 1, 1, 2, 2] and names == ["cat", "dog"]
    stopped(capsys, lambda: common.load_images(str(photos), "train", 16), bad)        # nor by way of the cache


@pytest.mark.parametrize("kind", ["link to nowhere", "named pipe"])
def test_file_that_is_no_file_neither_hangs_nor_crashes(photos, capsys, kind):
    bad = photos / "train" / "cat" / "0.jpg"
    os.mkfifo(bad) if kind == "named pipe" else bad.symlink_to(photos / "none.jpg")
    stopped(capsys, lambda: common.load_images(str(photos), "train", 16), bad, "--skip-bad")
    assert len(common.load_images(str(photos), "train", 16, skip_bad=True)[0]) == 5
    stopped(capsys, lambda: common.open_image(bad, 8), bad)


def test_hidden_files_and_folders_of_systems_are_passed_over(photos):
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git"):
        picture(photos / "train" / name / "0.png")
        picture(photos / "train" / "cat" / name / "0.png")
    (photos / "train" / "cat" / "._0.png").write_bytes(b"not a picture")
    x, y, names = common.load_images(str(photos), "train", 16)
    assert names == ["cat", "dog"] and y.tolist() == [1, 1, 1, 2, 2]


def test_class_with_nothing_but_unreadable_pictures(photos, capsys):
    for path in (photos / "train" / "dog").rglob("*.jp*"):
        path.write_bytes(b"no picture")
    stopped(capsys, lambda: common.load_images(str(photos), "train", 16, skip_bad=True), photos / "train" / "dog")


def test_read_image_takes_the_largest_centred_square(tmp_path):
    for wide in (True, False):
        a = np.zeros((30, 90, 3), dtype=np.uint8)
        a[:, :30, 0] = a[:, 60:, 2] = 255                  # red, green, blue thirds: green is the centre
        a[:, 30:60, 1] = 255
        a[:15, 30:60, 0] = 100                             # its upper half yellower
        Image.fromarray(a if wide else a.transpose(1, 0, 2)).save(tmp_path / "a.png")
        x = common.read_image(tmp_path / "a.png", 10)
        assert x.dtype == torch.uint8 and x.shape == (3, 10, 10) and x.is_contiguous()
        x = x if wide else x.transpose(1, 2)
        assert x[1].min() > 230 and x[1, :, 2:-2].min() > 250 and x[2, :, 2:-2].max() < 5
        assert abs(x[0, 1, 5] - 100.0) < 3 and x[0, 8, 5] < 3
    odd = np.zeros((10, 13, 3), dtype=np.uint8)
    odd[:, :, 0] = np.arange(13) * 10
    Image.fromarray(odd).save(tmp_path / "odd.png")        # the square is 1.5 ... 11.5, not 1 ... 11
    assert common.read_image(tmp_path / "odd.png", 10)[0, 5].float().mean().item() == pytest.approx(60, abs=0.6)


def test_resize_is_antialiased(tmp_path):
    """A fine checkerboard becomes even grey, and a fine ramp keeps its slope; nearest or plain bilinear would not."""
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    grey = common.read_image(tmp_path / "board.png", 16)[0, 2:-2, 2:-2].float()
    assert grey.std() < 1.5 and grey.mean().item() == pytest.approx(127.5, abs=1)
    want = np.asarray(Image.fromarray(board).convert("RGB").resize((40, 40), Image.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(common.read_image(tmp_path / "board.png", 40).numpy(), want)


def test_read_image_takes_what_cameras_and_painters_save(tmp_path):
    picture(tmp_path / "grey.png", 77, mode="L")
    assert (common.read_image(tmp_path / "grey.png", 8) == 77).all()
    picture(tmp_path / "alpha.png", (10, 20, 30, 255), mode="RGBA")
    assert common.read_image(tmp_path / "alpha.png", 8)[:, 4, 4].tolist() == [10, 20, 30]
    picture(tmp_path / "palette.gif", 3, mode="P")
    assert common.read_image(tmp_path / "palette.gif", 8).shape == (3, 8, 8)
    picture(tmp_path / "cmyk.jpg", (0, 0, 0, 0), mode="CMYK")
    assert common.read_image(tmp_path / "cmyk.jpg", 8).min() > 250
    turned = np.zeros((8, 8, 3), dtype=np.uint8)
    turned[:, :4] = 255                                    # stored with its left half white,
    exif = Image.Exif()
    exif[0x0112] = 6                                       # to be shown turned a quarter clockwise: the upper half
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    x = common.read_image(tmp_path / "turned.png", 8)[0]
    assert (x[:4] == 255).all() and (x[4:] == 0).all()
    with pytest.raises(OSError):
        common.read_image(tmp_path / "none.png", 8)


def test_open_image_says_which_file(tmp_path, capsys):
    (tmp_path / "x.jpg").write_text("no picture")
    for name in ("x.jpg", "none.jpg"):
        stopped(capsys, lambda name=name: common.open_image(tmp_path / name, 8), tmp_path / name)


def test_fashion_mnist_is_padded_and_labelled_from_1(monkeypatch, capsys):
    class Kept:
        def __init__(self, root, train, download):
            self.data = torch.full((4, 28, 28), 9 if train else 8, dtype=torch.uint8)
            self.targets, self.classes = torch.tensor([0, 9, 3, 3]), list("abcdefghij")
    monkeypatch.setattr(datasets, "FashionMNIST", Kept)
    for split, value in (("train", 9), ("val", 8)):
        x, y, names = common.load_images("fashion-mnist", split)
        assert x.shape == (4, 1, 32, 32) and x.dtype == torch.uint8 and y.tolist() == [1, 10, 4, 4] and len(names) == 10
        assert (x[:, :, 2:-2, 2:-2] == value).all() and not x[:, :, :2].any() and not x[..., -2:].any()

    def offline(*args, **options):
        raise RuntimeError("no route")
    monkeypatch.setattr(datasets, "FashionMNIST", offline)
    stopped(capsys, lambda: common.load_images("fashion-mnist"), "no route", "--data drawn")


# ---------------------------------------------------------------- batches, noise, pictures written

def test_batches_draw_classes_evenly_and_flip_half():
    torch.manual_seed(0)
    y = torch.tensor([2] * 97 + [1] * 3 + [3] * 10)
    x = torch.zeros(110, 1, 2, 2, dtype=torch.uint8)
    x[..., 0], x[:, 0, 0, 1] = 255, torch.arange(110)                         # left edge white; the index at its right
    x0, label = next(common.batches(x, y, 30_000))
    assert x0.dtype == torch.float32 and x0.min() == -1 and x0.max() == 1
    share = torch.bincount(label, minlength=4)[1:] / 30_000
    assert (share - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / 30_000)
    flipped = x0[:, 0, 1, 1] == 1
    assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(30_000)
    index = torch.where(flipped, x0[:, 0, 0, 0], x0[:, 0, 0, 1])
    index = ((index + 1) * 127.5).round().long()
    assert torch.equal(y[index], label)                                       # the label is that of the picture
    assert len(index.unique()) == 110                                         # and every picture has its turn
    some = torch.bincount(index, minlength=110)
    assert some[97:100].min() > 3000 and some[:97].max() < 200
    x0, label = next(common.batches(x, y, 30_000, even=False, mirror=False))
    assert not (x0[:, 0, 1, 1] == 1).any()                                    # none flipped, and shares as they come
    assert (torch.bincount(label, minlength=4)[1:] / 30_000 - torch.tensor([3, 97, 10]) / 110).abs().max() < 0.012


def test_batches_are_a_function_of_torch_s_generator():
    x, y = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8), torch.arange(50) % 3 + 1
    torch.manual_seed(5)
    data = common.batches(x, y, 8)
    first = list(itertools.islice(data, 3))
    state = torch.get_rng_state()
    rest = list(itertools.islice(data, 2))
    torch.manual_seed(5)
    for (a, k), (b, m) in zip(first, common.batches(x, y, 8), strict=False):
        assert torch.equal(a, b) and torch.equal(k, m)
    torch.set_rng_state(state)                                                # a new iterator, an old state: resumed
    for (a, k), (b, m) in zip(rest, common.batches(x, y, 8), strict=False):
        assert torch.equal(a, b) and torch.equal(k, m)
    assert not torch.equal(first[0][0], first[1][0])


def test_scaling_to_floats_and_back():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(x)), x)
    assert common.to_float(x)[[0, 255]].tolist() == [-1, 1]
    assert common.to_uint8(torch.tensor([-3.0, 3.0, 0.0039, -0.0041])).tolist() == [0, 255, 128, 127]      # rounded


def test_noise_of_an_image_depends_on_its_seed_alone():
    alone = common.image_noise((3, 4, 4), 12, 1)
    among = common.image_noise((3, 4, 4), 10, 5)
    later = common.image_noise((3, 4, 4), 11, 2)
    for _ in range(3):
        a, b, c = alone(), among(), later()
        assert torch.equal(a[0], b[2]) and torch.equal(a[0], c[1]) and not torch.equal(b[0], b[1])
        assert b.shape == (5, 3, 4, 4)
    before = torch.get_rng_state()
    x = common.image_noise((100_000,), 0, 1)()
    assert torch.equal(before, torch.get_rng_state())
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


def test_pictures_are_written_with_command_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/ddpm_afhq.py", "--n", "3"])
    torch.manual_seed(0)
    for channels in (3, 1):
        x = torch.rand(3, channels, 6, 5) * 2 - 1
        common.save_png(x, tmp_path / "png", first=7, seed=4)
        assert sorted(p.name for p in (tmp_path / "png").iterdir()) == ["000007.png", "000008.png", "000009.png"]
        with Image.open(tmp_path / "png" / "000008.png") as file:
            assert file.text == {"command": "python ddpm_afhq.py --n 3", "seed": "4"}
            assert file.mode == {3: "RGB", 1: "L"}[channels]
            back = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(back[:channels], common.to_uint8(x[1]))
    common.save_grid(x, tmp_path / "new" / "grid.png", 2, 4)
    with Image.open(tmp_path / "new" / "grid.png") as file:
        assert file.size == (2 * 5 + 3 * 2, 2 * 6 + 3 * 2) and file.text["seed"] == "4"


def test_command_with_a_name_that_is_no_utf_8_can_be_stamped(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ddpm_afhq.py", "--image", os.fsdecode(b"caf\xe9.png")])
    common.save_png(torch.zeros(1, 3, 4, 4), tmp_path)
    with Image.open(tmp_path / "000000.png") as file:
        assert file.text["command"] == "python ddpm_afhq.py --image caf\\udce9.png"


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def test_only_what_the_scripts_wrote_is_removed(tmp_path, capsys):
    common.save_png(torch.zeros(2, 3, 4, 4), tmp_path / "png")
    common.save_png(torch.zeros(1, 3, 4, 4), tmp_path / "png" / "cat")
    common.save_png(torch.zeros(1, 3, 4, 4), tmp_path / "elsewhere")
    picture(tmp_path / "png" / "my_holiday.png")
    picture(tmp_path / "png" / "cat" / "000007.png")                        # six digits, but without a stamp
    (tmp_path / "png" / "000000.png").rename(tmp_path / "png" / "best.png")  # ours once, but somebody named it
    (tmp_path / "png" / "000009.png").write_bytes(b"")                      # ours, cut short by a full disk
    common.remove_pictures(tmp_path / "png")
    assert files(tmp_path / "png") == ["best.png", "cat/000007.png", "my_holiday.png"]
    assert "they stay" in capsys.readouterr().err
    common.remove_pictures(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")                  # a link is followed: fid.py follows it too
    common.remove_pictures(tmp_path / "link")
    assert files(tmp_path / "elsewhere") == [] and (tmp_path / "link").is_symlink() and not capsys.readouterr().err


def test_new_pictures_take_the_place_of_the_old_ones_all_at_once(tmp_path, monkeypatch, capsys):
    args = types.SimpleNamespace(out=tmp_path, seed=0, steps=3, evaluations=6, frames=[], began=time.time())
    common.save_samples({"": -torch.ones(3, 3, 4, 4)}, args)
    picture(tmp_path / "png" / "mine.jpg")
    before, real = files(tmp_path), common.save_uint8

    def interrupted(x, path, seed):
        if path.name == "000001.png":
            raise KeyboardInterrupt
        real(x, path, seed)
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_uint8", interrupted)
        with pytest.raises(KeyboardInterrupt):
            common.save_samples({"dog": torch.ones(2, 3, 4, 4)}, args)
    assert [f for f in files(tmp_path) if not f.startswith("png.new/")] == before
    assert common.read_image(tmp_path / "png" / "000001.png", 4).max() == 0
    common.save_samples({"cat": torch.ones(2, 3, 4, 4), "dog": torch.ones(1, 3, 4, 4)}, args)
    assert files(tmp_path) == ["png/cat/000000.png", "png/cat/000001.png", "png/dog/000000.png", "png/mine.jpg", "samples.png"]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{tmp_path / 'samples.png'}: 3 pictures, 3 steps, NFE 2, ")


# ---------------------------------------------------------------- drawn faces

def test_drawn_faces_are_a_function_of_the_seed():
    x, y, names = common.drawn_faces(300, 16, 3)
    again = common.drawn_faces(300, 16, 3)
    assert x.shape == (300, 3, 16, 16) and x.dtype == torch.uint8 and len(names) == 3
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(x, common.drawn_faces(300, 16, 4)[0])
    assert torch.bincount(y).tolist() == [0, 100, 100, 100]
    assert len(x.flatten(1).unique(dim=0)) == 300
    assert len(common.drawn_faces(7, 8)[0]) == 7


def test_drawn_validation_faces_are_others_than_the_training_ones(monkeypatch):
    seeds = []
    monkeypatch.setattr(common, "drawn_faces", lambda n, size, seed: seeds.append((n, seed)))
    common.load_images("drawn", "train", 16), common.load_images("drawn", "val", 16)
    assert seeds[0][0] > seeds[1][0] >= 500 and seeds[0][1] != seeds[1][1]


def test_drawn_classes_differ_in_shape_and_not_in_colour():
    """A linear reader of brightness tells the classes apart on new faces; one of mean colours alone can not."""
    (x, y, _), (u, v, _) = common.drawn_faces(1500, 24, 0), common.drawn_faces(300, 24, 1)

    def right(features, ridge):
        a, b = (torch.cat([f, torch.ones(len(f), 1)], 1).double() for f in (features(x), features(u)))
        target = torch.nn.functional.one_hot(y - 1).double() - 1 / 3
        w = torch.linalg.solve(a.T @ a + ridge * torch.eye(a.shape[1]).double(), a.T @ target)
        return ((b @ w).argmax(1) + 1 == v).double().mean().item()

    def grey(x):
        g = common.to_float(x).mean(1).flatten(1)
        return (g - g.mean(1, keepdim=True)) / g.std(1, keepdim=True)
    assert right(grey, 100.0) > 0.75
    assert right(lambda x: common.to_float(x).mean((2, 3)), 1.0) < 0.5
    spread = common.to_float(x).mean((2, 3)).std(0)
    assert spread.min() > 0.15                             # colours vary from face to face


# ---------------------------------------------------------------- points and distances

def big(name, n=200_000):
    return common.points(name, n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", common.SETS)
def test_points_are_reproducible_and_labelled(name):
    a, b = (common.points(name, 1000, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (1000, 2) and a.dtype == torch.float32
    x, y = common.points(name, 1000, torch.Generator().manual_seed(1), labels=True)
    assert torch.equal(x, a) and y.shape == (1000,) and y.min() == 1
    assert y.max() == {"moons": 2, "circles": 2, "gaussians": 8}.get(name, 1)
    if y.max() > 1:
        share = torch.bincount(y)[1:] / 1000
        assert (share - 1 / y.max()).abs().max() < 0.07
    torch.manual_seed(9)
    c = common.points(name, 10)
    torch.manual_seed(9)
    assert torch.equal(c, common.points(name, 10))         # without a generator: torch's own


@pytest.mark.parametrize("name", ["swiss_roll", "moons", "scurve", "checkerboard"])
def test_points_have_the_course_s_scaling(name):
    x = big(name).double()
    assert x.mean().item() == pytest.approx(0, abs=0.02) and x.std(correction=0).item() == pytest.approx(2, rel=0.005)


def test_points_in_the_course_s_numbers():
    x = big("swiss_roll").double()
    assert [*x.amin(0).tolist(), *x.amax(0).tolist()] == pytest.approx([-3.29, -3.75, 3.24, 3.69], abs=0.01)
    assert x.std(0).tolist() == pytest.approx([1.852, 2.063], rel=0.005)
    raw = x * 6.7656 / 2 + 1.6592                          # (t cos t, t sin t), t in [1.5 pi, 4.5 pi]
    t = raw.norm(dim=1)
    torch.testing.assert_close(raw, torch.stack([t * t.cos(), t * t.sin()], 1), rtol=0, atol=2e-3)
    share = torch.histc(t / math.pi, 3, 1.5, 4.5) / len(t)
    assert share.tolist() == pytest.approx([3 / 8, 2 / 8, 3 / 8], abs=0.005)
    x = big("moons").double()
    assert [*x.amin(0).tolist(), *x.amax(0).tolist()] == pytest.approx([-3.84, -2.44, 4.54, 1.75], abs=0.01)
    x, y = common.points("circles", 2000, torch.Generator().manual_seed(0), labels=True)
    assert x[y == 1].norm(dim=1).tolist() == pytest.approx([4.0] * int((y == 1).sum()), rel=1e-5)
    assert x[y == 2].norm(dim=1).tolist() == pytest.approx([2.0] * int((y == 2).sum()), rel=1e-5)
    x, y = common.points("gaussians", 40_000, torch.Generator().manual_seed(0), labels=True)
    for k in range(1, 9):
        part = x[y == k]
        assert part.mean(0).norm().item() == pytest.approx(4, abs=0.03)
        assert part.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.02)
    x = big("checkerboard").double() * math.pi / math.sqrt(3) / 1.0
    assert x.abs().max().item() == pytest.approx(2 * math.pi, rel=1e-3)
    assert (x[:, 0].sin() * x[:, 1].sin() <= 1e-9).double().mean() > 0.9999
    x = big("normal").double()
    assert x.mean(0).abs().max() < 0.01 and torch.allclose(x.T.cov(), torch.eye(2).double(), atol=0.02)
    with pytest.raises(ValueError, match="swiss_roll"):
        common.points("spiral", 3)


def test_scurve_is_sklearn_s_curve():
    """(sin t, sign(t) (cos t - 1)), t in [-3 pi / 2, 3 pi / 2]: two arcs of unit circles about (0, -1) and (0, 1)."""
    x = big("scurve", 5000).double() * 1.101003 / 2
    centre = torch.stack([torch.zeros(5000), -torch.where(x[:, 1] > 0, -1.0, 1.0)], 1).double()
    assert (x - centre).norm(dim=1).tolist() == pytest.approx([1.0] * 5000, abs=1e-3)
    assert (x[:, 1] > 0).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_distances_by_hand():
    a, b = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert common.chamfer(a, b) == pytest.approx(1 + 4, abs=1e-12)
    assert common.chamfer_mean(a, b, clouds=1) == pytest.approx(2.5, abs=1e-12)
    assert common.emd(a, b) == pytest.approx(1.0, abs=1e-12)
    assert common.chamfer(a, b[:1]) == pytest.approx(1, abs=1e-12)             # sizes may differ
    c = torch.cat([a, a + 10]), torch.cat([b, b + 10])
    assert common.chamfer_mean(*c, clouds=2) == pytest.approx(2.5, abs=1e-10)   # clouds apart, then averaged
    assert common.chamfer_mean(*c, clouds=1) == pytest.approx(2.5, abs=1e-10)
    with pytest.raises(ValueError, match="equal size"):
        common.emd(a, b[:1])


def test_distances_obey_their_laws():
    a, b = (common.points("moons", 300, torch.Generator().manual_seed(s)) for s in (1, 2))
    for distance in (common.chamfer, common.emd, lambda a, b: common.chamfer_mean(a, b, 1)):
        assert distance(a, a) == pytest.approx(0, abs=1e-9)
        assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9) and distance(a, b) > 0
        assert distance(a, b[torch.randperm(300, generator=torch.Generator().manual_seed(0))]) == pytest.approx(distance(a, b), rel=1e-9)
    shift = torch.tensor([30.0, 40.0])
    assert common.emd(a, a + shift) == pytest.approx(50, rel=1e-6)


def test_floors_of_the_chamfer_distances():
    """Two draws of one swiss roll: 0.39 on the assignments' scale, 0.076 on the tutorial's. And what noise adds."""
    g = torch.Generator().manual_seed(0)
    rolls = [common.points("swiss_roll", 2048, g) for _ in range(6)]
    assert np.mean([common.chamfer(a, b) for a, b in zip(rolls[::2], rolls[1::2], strict=True)]) == pytest.approx(0.39, abs=0.03)
    blurred = rolls[0] + 0.1 * torch.randn(2048, 2, generator=g)
    assert common.chamfer(blurred, rolls[1]) == pytest.approx(22.9, rel=0.1)
    a, b = (common.points("swiss_roll", 10_000, g) for _ in range(2))
    assert common.chamfer_mean(a, b) == pytest.approx(0.0756, abs=0.005)
    assert common.chamfer_mean(torch.rand(10_000, 2, generator=g) * 8 - 4, b) == pytest.approx(1.04, abs=0.05)


# ---------------------------------------------------------------- download

BODY = bytes(range(256)) * 400


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY as its `manners` tell; notes each request's Range."""
    manners, ranges, tries = "good", [], 0

    def do_GET(self):
        cls = type(self)
        cls.tries += 1
        asked = self.headers.get("Range")
        cls.ranges.append(asked)
        start = int(asked.split("=")[1].rstrip("-")) if asked else 0
        manners = cls.manners
        if manners in ("404", "500"):
            return self.send_error(int(manners))
        if manners == "500 once" and cls.tries == 1:
            return self.send_error(500)
        if manners.startswith("no range"):
            start = 0
        if start and start >= len(BODY):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        part = BODY[start:]
        claim = len(part)
        if manners == "claims more":
            claim += 1000
        if manners == "claims nonsense":
            claim = "many"
        if "breaks" in manners and cls.tries < 3 or manners.endswith("always breaks"):
            part = part[:40_000]
        if "chunked" in manners:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if cls.tries >= 3:
                self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()
        else:
            self.send_header("Content-Length", str(claim))
            self.end_headers()
            self.wfile.write(part)
        self.close_connection = True

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.manners, Server.ranges, Server.tries = "good", [], 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/afhq.zip"
        running.shutdown()


SHA = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize("manners", ["good", "breaks", "no range, breaks", "500 once", "chunked, breaks", "claims nonsense"])
def test_download_gets_the_file_whole(server, tmp_path, manners):
    Server.manners = manners
    common.download(server, tmp_path / "new" / "a.zip", SHA)
    assert (tmp_path / "new" / "a.zip").read_bytes() == BODY
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.zip"]
    if manners == "breaks":
        assert Server.ranges == [None, "bytes=40000-", "bytes=80000-"]        # goes on where it stopped
    if manners == "no range, breaks":
        assert Server.ranges == [None, "bytes=40000-", "bytes=40000-"]


def test_download_goes_on_from_an_earlier_day_s_part(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(BODY[:100_000])
    common.download(server, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == BODY and Server.ranges == ["bytes=100000-"]
    (tmp_path / "b.zip.part").write_bytes(BODY + b"of another file")
    common.download(server, tmp_path / "b.zip")
    assert (tmp_path / "b.zip").read_bytes() == BODY


@pytest.mark.parametrize("manners", ["claims more", "no range, always breaks", "500"])
def test_download_that_never_ends_well_is_no_file(server, tmp_path, capsys, manners):
    Server.manners = manners
    stopped(capsys, lambda: common.download(server, tmp_path / "a.zip"), server, "answered 500" if manners == "500" else "", "five times")
    assert not (tmp_path / "a.zip").exists()


def test_download_of_the_wrong_thing(server, tmp_path, capsys):
    stopped(capsys, lambda: common.download(server, tmp_path / "a.zip", "0" * 64), server, "hash", "--url")
    assert not list(tmp_path.iterdir())
    Server.manners = "404"
    stopped(capsys, lambda: common.download(server, tmp_path / "a.zip"), "404", "--url")
    assert Server.tries == 2                                # a 404 isn't asked for five times
    stopped(capsys, lambda: common.download("afhq.zip", tmp_path / "a.zip"), "afhq.zip")


def archive(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


@pytest.mark.parametrize("name", ["../evil.txt", "good/../../evil.txt", "/tmp/common-test-evil.txt", "a/b/../../../evil.txt"])
def test_unpack_lets_no_member_out(tmp_path, capsys, name):
    archive(tmp_path / "a.zip", {"good/1.txt": "1", name: "evil"})
    stopped(capsys, lambda: common.unpack(tmp_path / "a.zip", tmp_path / "in" / "there"), "leads out")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.zip"]
    assert not os.path.exists("/tmp/common-test-evil.txt")


def test_unpack_of_something_else(tmp_path, capsys):
    (tmp_path / "a.zip").write_bytes(b"<html>")
    stopped(capsys, lambda: common.unpack(tmp_path / "a.zip", tmp_path / "in"), tmp_path / "a.zip", "delete it")
    archive(tmp_path / "secret.zip", {"1.txt": "1"})
    data = bytearray((tmp_path / "secret.zip").read_bytes())
    data[6] |= 1                                            # the flag of an encrypted member, in its header
    data[data.index(b"PK\x01\x02") + 8] |= 1                # and in the directory
    (tmp_path / "secret.zip").write_bytes(data)
    stopped(capsys, lambda: common.unpack(tmp_path / "secret.zip", tmp_path / "in"), tmp_path / "secret.zip", "encrypted")
    archive(tmp_path / "b.zip", {"a..b/..c/1.txt": "fine"})
    common.unpack(tmp_path / "b.zip", tmp_path / "in")
    assert (tmp_path / "in" / "a..b" / "..c" / "1.txt").read_text() == "fine"


def test_common_downloads_unpacks_and_builds_the_evaluation_set(server, tmp_path, monkeypatch, capsys):
    """python common.py: from the zip to data/afhq/eval, whose PNGs are training's resize, lossless."""
    members, chance = {}, np.random.default_rng(0)
    for split, c, i in itertools.product(("train", "val"), ("cat", "dog"), range(2)):
        jpg = io.BytesIO()
        Image.fromarray(chance.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(jpg, "JPEG")
        members[f"afhq/{split}/{c}/{c}{i}.jpg"] = jpg.getvalue()
    archive(tmp_path / "source.zip", members)
    monkeypatch.setattr("test_common.BODY", (tmp_path / "source.zip").read_bytes())
    root = tmp_path / "data" / "pets"
    common.main(["--data", str(root), "--url", server, "--size", "16"])
    assert "4 pictures" in capsys.readouterr().out
    assert len(common.load_images(str(root), "train", 16)[0]) == 4
    files = sorted(p.relative_to(root / "eval").as_posix() for p in (root / "eval").rglob("*.png"))
    assert files == ["cat/000000.png", "cat/000001.png", "dog/000002.png", "dog/000003.png"]
    with Image.open(root / "eval" / files[3]) as file:
        got = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    assert torch.equal(got, common.read_image(root / "val" / "dog" / "dog1.jpg", 16))
    tries = Server.tries
    common.main(["--data", str(root), "--url", server, "--size", "16"])
    assert Server.tries == tries                           # data that is there isn't fetched again


@pytest.fixture
def afhq(tmp_path):
    """Writes an archive like AFHQ's, three pictures in each split, to a path."""
    def write(path):
        jpg = io.BytesIO()
        Image.new("RGB", (20, 20)).save(jpg, "JPEG")
        path.parent.mkdir(parents=True, exist_ok=True)
        archive(path, {f"afhq/{split}/cat/{i}.jpg": jpg.getvalue() for split in ("train", "val") for i in range(3)})
        return path
    return write


def test_archive_that_is_there_is_not_fetched_again(server, afhq, tmp_path):
    afhq(tmp_path / "data" / "afhq.zip")
    args = ["--data", str(tmp_path / "data" / "afhq"), "--url", server, "--size", "16"]
    common.main(args)
    assert Server.tries == 0 and len(files(tmp_path / "data" / "afhq" / "eval")) == 3


@pytest.mark.parametrize("at", [1, 2])
def test_killed_between_the_renames_of_two_splits(server, afhq, tmp_path, monkeypatch, at):
    """Whichever split is there when the first run ends, the second run puts the other one beside it."""
    afhq(tmp_path / "data" / "afhq.zip")
    root, count, real = tmp_path / "data" / "afhq", [], pathlib.Path.rename

    def killed(self, target):
        count.append(target)
        if len(count) == at:
            raise KeyboardInterrupt
        return real(self, target)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            common.main(["--data", str(root), "--url", server, "--size", "16"])
    assert len([p for p in root.iterdir() if p.is_dir()]) == at - 1
    common.main(["--data", str(root), "--url", server, "--size", "16"])
    assert [len(files(root / split)) for split in ("train", "val", "eval")] == [3, 3, 3] and Server.tries == 0


@pytest.mark.parametrize("there", ["train", "val"])
def test_one_split_without_the_other_and_without_the_archive(server, tmp_path, capsys, there):
    picture(tmp_path / "pets" / there / "cat" / "0.png")
    missing = tmp_path / "pets" / {"train": "val", "val": "train"}[there]
    stopped(capsys, lambda: common.main(["--data", str(tmp_path / "pets"), "--url", server]), missing / "CLASS")
    assert Server.tries == 0                                # never AFHQ's pictures beside somebody's own


def test_evaluation_set_holds_its_own_pictures_only(photos, capsys):
    (photos / "train").rename(photos / "val")
    picture(photos / "train" / "cat" / "0.png")
    ask = lambda size: common.main(["--data", str(photos), "--size", str(size)])      # noqa: E731
    ask(16)
    assert len(files(photos / "eval")) == 5
    (photos / "val" / "cat" / "0.png").unlink()
    ask(8)
    assert len(files(photos / "eval")) == 4                 # neither the old size nor the removed picture stays
    assert {Image.open(photos / "eval" / f).size for f in files(photos / "eval")} == {(8, 8)}
    picture(photos / "eval" / "cat" / "flickr_cat_1.jpg")   # as a course's own program writes
    stopped(capsys, lambda: ask(16), photos / "eval", "flickr_cat_1.jpg")
    assert len(files(photos / "eval")) == 5 and not (photos / "eval.new").exists()


def test_unpacking_that_was_interrupted_is_not_taken_for_the_data(server, afhq, tmp_path, monkeypatch):
    monkeypatch.setattr("test_common.BODY", afhq(tmp_path / "source.zip").read_bytes())
    args = ["--data", str(tmp_path / "data" / "afhq"), "--url", server, "--size", "16"]
    done, real = [], zipfile.ZipFile.extract

    def interrupted(self, member, *rest):
        done.append(member)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(self, member, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            common.main(args)
    common.main(args)
    assert len(common.load_images(args[1], "train", 16)[0]) == 3


def test_common_shows_the_drawn_faces_and_the_point_sets(tmp_path, capsys, monkeypatch):
    real = common.drawn_faces
    monkeypatch.setattr(common, "drawn_faces", lambda n, size, seed: real(60, size, seed))
    common.main(["--data", "drawn", "--size", "16", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert str(tmp_path / "samples.png") in said and str(tmp_path / "points.png") in said
    with Image.open(tmp_path / "samples.png") as file:
        assert file.size == (8 * 18 + 2, 3 * 18 + 2)
    with Image.open(tmp_path / "points.png") as file:
        assert file.text["seed"] == "0" and len(file.convert("RGB").getcolors(10 ** 6)) > 100      # hues of the parts


@pytest.mark.parametrize("flags", [("--size", "0"), ("--size", "-1"), ("--out", ""), ("--data", ""), ("--siz", "8"), ("--seed", str(2 ** 64))])
def test_common_refuses_what_makes_no_sense(capsys, flags):
    stopped(capsys, lambda: common.main(list(flags)), flags[0])


# ---------------------------------------------------------------- devices

def test_device_and_number_format(capsys):
    assert common.device("cpu") == torch.device("cpu") and common.device().type in ("cpu", "cuda", "mps")
    for name in ("cuda", "mps"):
        if common.device("auto").type != name:
            if not (torch.cuda.is_available() if name == "cuda" else torch.backends.mps.is_available()):
                stopped(capsys, lambda name=name: common.device(name), name, "--device")
    cpu = torch.device("cpu")
    assert common.bf16("bf16", cpu) is True and common.bf16("fp32", cpu) is False
    assert isinstance(common.bf16("auto", cpu), bool)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compile_without_a_compiler_goes_on_without(tmp_path, monkeypatch, capsys, device):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(common, "device", torch.device)
    args = types.SimpleNamespace(out=tmp_path, device=device, compile=True)
    assert common.prepare(args).compile is (device == "cuda")
    assert ("no C++ compiler" in capsys.readouterr().err) is (device == "cpu")
    (tmp_path / "my-c++").write_text("#!/bin/sh\n")
    (tmp_path / "my-c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "my-c++"))
    assert common.prepare(types.SimpleNamespace(out=tmp_path, device=device, compile=True)).compile


def test_folder_that_can_not_be_written_is_found_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/here"):
        stopped(capsys, lambda out=out: common.prepare(types.SimpleNamespace(out=out)), out, "--out")


# ---------------------------------------------------------------- flags

def test_types_of_flags_and_their_words():
    import argparse
    nan, inf = "nan", "inf"
    table = [(common.count, ["1", "12000"], ["0", "-1", "1.5", "x", nan]),
             (common.natural, ["0", str(2 ** 61)], ["-1", str(2 ** 64), "1e3"]),
             (common.finite, ["0", "-3", "1e30"], [nan, inf, "-inf", "one"]),
             (common.positive, ["1e-9", "3"], ["0", "-1", nan, inf]),
             (common.share, ["0", "1", "0.5"], ["-0.1", "1.1", nan]),
             (common.fraction, ["1", "0.0004"], ["0", "1.1", nan]),
             (common.decay, ["0", "0.9999"], ["1", "-1", nan])]
    for kind, good, bad in table:
        assert [kind(text) for text in good] == [float(text) if "." in text or "e" in text else int(text) for text in good]
        for text in bad:
            with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
                kind(text)


class Network(torch.nn.Module):
    """A network of one layer.

    ch: channels (course: 7)
    mult: factors
    """

    def __init__(self, size, channels, ch=3, mult=(1, 2), rate=0.5):
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, channels, 1)
        if ch == 5:
            common.stop("--ch 5 makes no network.")


def some_parser(*argv, out):
    p = common.parser("A script.\nMore.", "some", "data", "size", "ckpt", "device", "dtype", "compile", "train", "resume", "save", "gif")
    common.add_network_flags(p, Network)
    for name, default in dict(iters=4, batch=2, steps=250, T=1000).items():
        p.add_argument(f"--{name}", type=common.count, default=default)
    for name, default in dict(lr=0.1, ema=0.9).items():
        p.add_argument(f"--{name}", type=common.positive, default=default)
    for name, choices in dict(loss=["l2"], schedule=["cosine", "linear"], predict=["v"], weight=["uniform"]).items():
        p.add_argument(f"--{name}", default=choices[0], choices=choices)
    return p.parse_args([*map(str, argv), "--out", str(out)])


def test_flags_of_the_network_come_from_its_keywords(tmp_path):
    args = some_parser("--ch", 9, "--mult", 3, 4, "--data=drawn", out=tmp_path)
    assert (args.ch, args.mult, args.rate) == (9, [3, 4], 0.5) and args.typed == {"ch", "mult", "out", "data"}
    net = common.network_keywords(Network, args, torch.zeros(2, 1, 32, 32))
    assert net == dict(size=32, channels=1, ch=9, mult=[3, 4], rate=0.5)
    assert common.network_keywords(Network, some_parser(out=tmp_path), torch.zeros(2, 1, 8, 8))["mult"] == [1, 2]     # lists: plain in a file


def test_network_refuses_its_flags_before_data_is_read(tmp_path, capsys):
    stopped(capsys, lambda: common.prepare(some_parser("--train", "--ch", 5, out=tmp_path), ["some"]), "--ch 5 makes no network")
    stopped(capsys, lambda: common.prepare(some_parser("--train", "--data", "fashion-mnist", "--size", 64, out=tmp_path), ["some"]), "--size 64")
    assert common.prepare(some_parser("--train", "--data", "fashion-mnist", out=tmp_path), ["some"]).size == 32


def test_steps_follow_the_number_of_levels_unless_typed(tmp_path, capsys):
    assert common.prepare(some_parser("--train", "--T", 200, out=tmp_path), ["some"]).steps == 200
    stopped(capsys, lambda: common.prepare(some_parser("--train", "--T", 200, "--steps", 250, out=tmp_path), ["some"]), "--steps 250", "1..200")


# ---------------------------------------------------------------- checkpoints

def whole(**changes):
    """A checkpoint as Run writes it, of the network above."""
    torch.manual_seed(0)
    net = dict(size=8, channels=3, ch=3, mult=[1, 2], rate=0.5)
    state = Network(**net).state_dict()
    opt = torch.optim.AdamW(Network(**net).parameters()).state_dict()
    kept = dict(script="some", net=net, method=dict(schedule="cosine", predict="v", weight="uniform", T=50), names=["cat", "dog"], iter=2,
                log=[[2, 0.5, 9.0]], model=state, ema=state, opt=opt, flags=dict(iters=7, save=3, batch=4, lr=0.3, ema=0.5, loss="l2", seed=6))
    return {k: v for k, v in (kept | changes).items() if v is not None}


BROKEN = {
    "no ema": dict(ema=None), "no net": dict(net=None), "no method": dict(method=None), "no names": dict(names=None), "no iter": dict(iter=None),
    "method without schedule": dict(method=dict(predict="v", weight="uniform")),
    "method with more": dict(method=dict(schedule="cosine", predict="v", weight="uniform", out="/tmp")),
    "schedule of nobody": dict(method=dict(schedule="square", predict="v", weight="uniform")),
    "T of text": dict(method=dict(schedule="cosine", predict="v", weight="uniform", T="50")),
    "T of 0": dict(method=dict(schedule="cosine", predict="v", weight="uniform", T=0)),
    "names of text": dict(names="cat"), "names of numbers": dict(names=[1, 2]), "names that lead out": dict(names=["cat", "../../x"]),
    "name of a parent": dict(names=[".."]), "name of a Windows path": dict(names=["a\\b"]), "name of nothing": dict(names=["cat", ""]),
    "net of text": dict(net="unet"), "net without size": dict(net=dict(channels=3)), "net of more": dict(net=dict(size=8, channels=3, out=4)),
    "net of nonsense": dict(net=dict(size=8, channels="three", ch=3, mult=[1], rate=0.5)),
    "ema of text": dict(ema=dict(w="heavy")), "ema of another shape": dict(ema={"layer.weight": torch.zeros(1), "layer.bias": torch.zeros(3)}),
    "ema of other names": dict(ema={"w": torch.zeros(1)}), "ema of nan": dict(ema={"layer.weight": torch.full((3, 3, 1, 1), math.nan), "layer.bias": torch.zeros(3)}),
    "script of a number": dict(script=3), "another script": dict(script="other"), "no script": dict(script=None),
}
BROKEN_FOR_RESUME = {
    "no model": dict(model=None), "no opt": dict(opt=None), "flags of text": dict(flags="many"), "flags of more": dict(flags=dict(out="/tmp")),
    "flags of another kind": dict(flags=dict(iters="many")), "log of text": dict(log="long"),
    "model of inf": dict(model={"layer.weight": torch.full((3, 3, 1, 1), math.inf), "layer.bias": torch.zeros(3)}),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_checkpoint_with_foreign_content_is_refused(tmp_path, capsys, harm):
    torch.save(whole(**BROKEN[harm]), tmp_path / "x.pt")
    stopped(capsys, lambda: common.prepare(some_parser("--ckpt", tmp_path / "x.pt", out=tmp_path), ["some"]), tmp_path / "x.pt")


@pytest.mark.parametrize("harm", BROKEN | BROKEN_FOR_RESUME)
def test_training_with_foreign_content_is_not_resumed(tmp_path, capsys, harm):
    torch.save(whole(**(BROKEN | BROKEN_FOR_RESUME)[harm]), tmp_path / "model.pt")
    stopped(capsys, lambda: common.prepare(some_parser("--resume", out=tmp_path), ["some"]), tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:300])
    with pytest.raises(SystemExit):
        common.prepare(some_parser("--resume", out=tmp_path), ["some"])
    said = capsys.readouterr().err
    assert "--out" in said and "--ckpt" not in said          # the way out of a --resume is no --ckpt


def test_checkpoint_settles_its_flags_and_resume_restores_the_others(tmp_path, capsys):
    torch.save(whole(), tmp_path / "model.pt")
    args = common.prepare(some_parser(out=tmp_path), ["some"])                               # to sample
    assert (args.T, args.size, args.steps, args.batch, args.iters) == (50, 8, 50, 2, 4) and not args.train
    assert args.names == ["cat", "dog"] and args.net["size"] == 8
    args = common.prepare(some_parser("--resume", "--batch", 8, "--ch", 3, out=tmp_path), ["some"])
    assert (args.batch, args.iters, args.lr, args.ema, args.seed, args.save) == (8, 7, 0.3, 0.5, 6, 3) and args.train
    for flags in (["--T", 60], ["--ch", 4], ["--mult", 1], ["--size", 16], ["--schedule", "linear"]):
        stopped(capsys, lambda flags=flags: common.prepare(some_parser("--resume", *flags, out=tmp_path), ["some"]), flags[0], flags[1], "leave the flag out")
        stopped(capsys, lambda flags=flags: common.prepare(some_parser(*flags, out=tmp_path), ["some"]), flags[0])
    stopped(capsys, lambda: common.prepare(some_parser("--resume", "--iters", 1, out=tmp_path), ["some"]), "2 iterations already", "--iters 1")
    stopped(capsys, lambda: common.prepare(some_parser("--train", out=tmp_path), ["some"]), tmp_path / "model.pt", "--resume", "--out")
    stopped(capsys, lambda: common.prepare(some_parser("--resume", "--ckpt", "x.pt", out=tmp_path), ["some"]), "--ckpt x.pt", "--train --ckpt")
    stopped(capsys, lambda: common.prepare(some_parser("--resume", out=tmp_path / "new"), ["some"]), tmp_path / "new" / "model.pt", "--train")
    weights = {k: v for k, v in whole().items() if k not in ("model", "opt", "log", "flags")}     # as shipped
    torch.save(weights, tmp_path / "model.pt")
    stopped(capsys, lambda: common.prepare(some_parser("--resume", out=tmp_path), ["some"]), "weights", "--train --ckpt")
    args = common.prepare(some_parser("--train", "--ckpt", tmp_path / "model.pt", out=tmp_path / "new"), ["some"])
    assert args.train and args.T == 50 and args.batch == 2 and args.checkpoint["iter"] == 2


# ---------------------------------------------------------------- what would take seconds to import

@pytest.mark.parametrize("channels", [1, 3])
def test_grid_is_torchvisions(channels):
    make_grid = pytest.importorskip("torchvision.utils").make_grid
    x = torch.randint(0, 256, (7, channels, 5, 6), dtype=torch.uint8)
    for nrow in (1, 2, 3, 7, 9):
        assert torch.equal(common.grid(x, nrow), make_grid(x, nrow, padding=2, pad_value=255))


def test_without_values_layers_have_shapes_only_and_the_initialisation_returns():
    before = torch.nn.init.normal_
    with pytest.raises(ZeroDivisionError), common.without_values():
        layer = torch.nn.Embedding(4, 8)
        raise ZeroDivisionError
    assert layer.weight.is_meta and layer.weight.shape == (4, 8) and torch.nn.init.normal_ is before


def test_sampling_from_the_shipped_weights_imports_no_compiler(tmp_path):
    code = ("import sys, cfg_afhq; cfg_afhq.main(sys.argv[1:]); "
            "sys.exit(' '.join({'torch._dynamo', 'torchvision', 'scipy'} & set(sys.modules)) or 0)")
    root = pathlib.Path(common.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, "--n", "1", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)],
                          cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bf16", [False, True])
def test_loaded_weights_give_the_bits_that_autocast_gives(bf16, tmp_path):
    flags = ["--out", str(tmp_path), "--device", "cpu", "--dtype", "bf16" if bf16 else "fp32"]
    args = common.prepare(cfg_afhq.parse_args(flags), cfg_afhq.TRAINED_BY)
    loaded, plain = common.load(cfg_afhq.UNet(**args.net), args), cfg_afhq.UNet(**args.net)
    plain.load_state_dict({name: w.float() for name, w in args.checkpoint["ema"].items()})
    plain = plain.eval().to(memory_format=torch.channels_last)
    assert loaded.conv_in.weight.dtype == loaded.time[0].bias.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert loaded.label.weight.dtype == loaded.mid[0].norm1.weight.dtype == torch.float32
    x, t, y = torch.randn(3, 3, 64, 64), torch.tensor([1.0, 300.5, 1000.0]), torch.tensor([0, 1, 3])
    with torch.no_grad(), common.autocast(args.device, bf16):
        assert torch.equal(loaded(x, t, y), plain(x, t, y))


# ---------------------------------------------------------------- the faster norm

@pytest.mark.parametrize("shape", [(3, 64, 8, 8), (2, 32, 32, 32), (2, 24, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_torchs_with_its_gradient(shape, dtype):
    torch.manual_seed(0)
    ours, theirs = common.GroupNorm(8, shape[1]), torch.nn.GroupNorm(8, shape[1])
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for norm in (ours, theirs):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype, memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = norm(x)
        out.float().square().sum().backward()
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        found.append((out.detach().float(), x.grad.float(), norm.weight.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("shape", "groups", "train", "inside"), [
    ((1, 32, 31, 31), 8, False, torch.float32), ((1, 32, 32, 32), 8, False, torch.bfloat16),      # forward: below 32 x 32
    ((1, 32, 32, 32), 8, True, torch.float32), ((1, 32, 40, 40), 8, True, torch.float32),         # both passes: at every side
    ((8, 16, 256, 256), 4, True, torch.bfloat16),                                                 # 2^23 values are too many
    ((1, 30, 16, 16), 2, True, torch.float32), ((1, 32, 16, 16), 2, True, torch.bfloat16)])       # groups of 15 and of 16
def test_group_norm_computes_in_float32_where_bfloat16_is_slow(shape, groups, train, inside, monkeypatch):
    seen, native = [], torch.nn.functional.group_norm
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda x, *rest: seen.append((x.device.type, x.dtype)) or native(x, *rest))
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("meta", torch.bfloat16)):
        out = common.GroupNorm(groups, shape[1], device=device)(torch.zeros(shape, dtype=dtype, device=device, requires_grad=train))
        assert out.dtype == dtype
    assert seen == [("cpu", torch.float32), ("cpu", inside), ("meta", torch.bfloat16)]


# ---------------------------------------------------------------- the optimiser

@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (8, 8), (5, 3, 3, 3)])
def test_muon_goes_along_the_nearest_matrix_with_singular_values_1(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    start, p.grad = p.detach().clone(), torch.randn(shape)
    common.Muon([p], lr=0.1, weight_decay=0.5).step()
    step = -(p.detach() - start * (1 - 0.1 * 0.5)).flatten(1) / (0.1 * 0.2 * max(shape[0], p[0].numel()) ** 0.5)
    u, _, v = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
    assert ((torch.linalg.svdvals(step) - 1).abs() < 0.35).all()
    assert (step * (u @ v)).sum().item() > 0.95 * step.norm().item() * (u @ v).norm().item()


def test_muon_is_adam_for_vectors_and_skips_what_has_no_gradient():
    torch.manual_seed(0)
    ours, theirs, idle = (torch.nn.Parameter(torch.ones(7)) for _ in range(3))
    a, b = common.Muon([ours, idle], lr=0.01), torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99))
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(7)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert torch.equal(idle, torch.ones(7))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_muon_is_that_of_torch(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a = common.Muon([ours], bf16=True, lr=0.01)
    b = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * 0.01 * 0.2 * 40 ** 0.5 * 0.02)    # products in bfloat16: 2 % of the way


def test_muon_goes_on_from_its_saved_state(tmp_path):
    def network():
        torch.manual_seed(0)
        return torch.nn.Linear(4, 3)

    def learn(net, optimizer, steps):
        for i in steps:
            torch.manual_seed(i)
            optimizer.zero_grad()
            net(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    straight, stopped_, resumed = network(), network(), network()
    learn(straight, common.Muon(straight.parameters(), lr=0.1), range(6))
    first = common.Muon(stopped_.parameters(), lr=0.1)
    learn(stopped_, first, range(3))
    torch.save(first.state_dict(), tmp_path / "opt.pt")
    second = common.Muon(resumed.parameters())
    second.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    resumed.load_state_dict(stopped_.state_dict())
    learn(resumed, second, range(3, 6))
    assert torch.equal(straight.weight, resumed.weight) and torch.equal(straight.bias, resumed.bias)


# ---------------------------------------------------------------- the frame of a training

@pytest.fixture
def frame(tmp_path):
    """A Run of the network above, with flags as typed."""
    def make(*argv, out=tmp_path / "out", names=("cat", "dog"), ready=None):
        args = common.prepare(some_parser("--train" if "--resume" not in argv else "--iters", *([] if "--resume" not in argv else [7]), *argv, out=out), ["some"])
        args.net = args.net or dict(size=8, channels=3, ch=3, mult=[1, 2], rate=0.5)
        network, ema = Network(**args.net), Network(**args.net)
        if ready:
            ready(args)
        return args, network, ema, common.Run(args, list(names), network, ema, torch.optim.AdamW(network.parameters()))
    return make


def test_run_seeds_torch_from_seed_iteration_and_process_alone(frame, tmp_path):
    def draws(*argv):
        args, _, _, run = frame("--iters", 3, *argv, out=tmp_path / "new")
        got = []
        for _ in run:
            got.append(torch.rand(2).tolist())
            torch.rand(torch.randint(50, ()).item())        # chance elsewhere must not matter
        return got
    first = draws()
    assert first == draws() and len({tuple(x) for x in first}) == 3
    assert first != draws("--seed", 1) and first != draws("--seed", 256) != draws("--seed", 2 ** 32)


def test_second_process_draws_other_noise_and_ends_with_the_training(frame, monkeypatch):
    monkeypatch.setattr(common.dist, "destroy_process_group", lambda: None)
    drawn = []
    for rank in (0, 1):
        *_, run = frame("--iters", 1, ready=lambda args, rank=rank: vars(args).update(rank=rank, world=2))
        try:
            for _ in run:
                drawn.append(torch.rand(2))
            ended = False
        except SystemExit as end:
            ended = end.code == 0
        assert ended is (rank == 1)                         # one process samples
    assert not torch.equal(*drawn)


def test_run_writes_log_checkpoint_and_previews(frame, tmp_path):
    args, network, ema, run = frame("--iters", 5, "--save", 2)
    for it in run:
        run.step(it, torch.tensor(float(it)), lambda noise: noise().clamp(-1, 1))
    kept = torch.load(args.out / "model.pt", weights_only=True)
    assert set(kept) == {"script", "net", "method", "flags", "names", "iter", "log", "model", "ema", "opt"}
    assert kept["iter"] == 5 and [row[:2] for row in kept["log"]] == [[2, 1.5], [4, 3.5], [5, 5.0]]
    assert kept["method"] == dict(schedule="cosine", predict="v", weight="uniform", T=1000) and kept["flags"]["batch"] == 2
    assert files(args.out) == ["log.csv", "loss.png", "model.pt", "samples_000002.png", "samples_000004.png", "samples_000005.png"]
    with Image.open(args.out / "samples_000004.png") as file:
        assert file.size == (8 * 10 + 2, 10 + 2)            # eight pictures in a row
    for name in ("log.csv", "loss.png"):
        (args.out / name).unlink()                          # killed between the renaming and the log,
    args, _, _, run = frame("--resume", "--iters", 5)
    assert list(run) == []                                  # nothing left to do, but both are there again
    with open(args.out / "log.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["iteration", "2", "4", "5"]
    assert (args.out / "loss.png").is_file()


def test_run_stops_at_what_is_not_finite(frame, tmp_path, capsys):
    args, network, ema, run = frame("--iters", 200)
    it = iter(run)
    for value in (1.0, math.nan, *[1.0] * 47):
        run.step(next(it), torch.tensor(value))
    stopped(capsys, lambda: run.step(next(it), torch.tensor(1.0)), "iteration 2 ", "train again with a lower --lr")
    assert not (args.out / "model.pt").exists()             # so nothing is said to be kept there
    for which in (1, 2):
        args, *nets, run = frame("--iters", 200, "--save", 1, out=tmp_path / f"new{which}")
        it = iter(run)
        run.step(next(it), torch.tensor(1.0))
        with torch.no_grad():
            nets[which - 1].layer.bias[0] = math.nan        # the average goes wrong when --ema does
        stopped(capsys, lambda it=it, run=run: run.step(next(it), torch.tensor(1.0)), "weights after iteration 2", args.out / "model.pt", "--resume")
        assert torch.load(args.out / "model.pt", weights_only=True)["iter"] == 1


def test_run_on_a_full_disk_keeps_the_last_checkpoint(frame, capsys, monkeypatch):
    args, *_, run = frame("--iters", 2, "--save", 1)
    it = iter(run)
    run.step(next(it), torch.tensor(1.0))
    (args.out / "model.pt.tmp").symlink_to("/dev/full")
    stopped(capsys, lambda: common.run(lambda: run.step(next(it), torch.tensor(1.0))), args.out / "model.pt.tmp", "make room")
    assert torch.load(args.out / "model.pt", weights_only=True)["iter"] == 1


def test_process_whose_torchrun_is_gone_ends(frame, capsys, monkeypatch):
    args, *_, run = frame("--iters", 50, ready=lambda args: vars(args).update(world=2))
    it = iter(run)
    next(it)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    stopped(capsys, lambda: run.step(50, torch.tensor(1.0)), "torchrun has ended")


def test_run_starts_from_weights_or_goes_on(frame, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    kept = whole(model={k: v + 1 for k, v in whole()["ema"].items()})
    torch.save(kept, tmp_path / "a" / "model.pt")
    args, network, ema, run = frame("--resume", out=tmp_path / "a")
    assert all(torch.equal(network.state_dict()[k], kept["model"][k]) and torch.equal(ema.state_dict()[k], kept["ema"][k]) for k in kept["ema"])
    assert next(iter(run)) == 3
    args, network, ema, run = frame("--ckpt", tmp_path / "a" / "model.pt", out=tmp_path / "b", names=["lion"])       # other animals may be learnt
    assert all(torch.equal(network.state_dict()[k], kept["ema"][k]) and torch.equal(ema.state_dict()[k], kept["ema"][k]) for k in kept["ema"])
    assert next(iter(run)) == 1
    stopped(capsys, lambda: frame("--resume", out=tmp_path / "a", names=["lion"]), "cat, dog", "lion", "--data")
    torch.save(kept | dict(opt={"state": {}, "param_groups": []}), tmp_path / "a" / "model.pt")
    stopped(capsys, lambda: frame("--resume", out=tmp_path / "a"), "optimiser", "--train --ckpt")


def test_torchrun_is_told_apart_from_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stopped(capsys, lambda: common.prepare(some_parser("--train", "--batch", 3, out=tmp_path), ["some"]), "--batch 3", "2 processes")
    torch.save(whole(), tmp_path / "model.pt")
    stopped(capsys, lambda: common.prepare(some_parser(out=tmp_path), ["some"]), "torchrun", "--train")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        some_parser("--batch", 0, out=tmp_path)
    assert end.value.code == 2 and capsys.readouterr().err == ""        # the first process speaks for all


def test_interrupted_and_full_end_without_a_traceback(capsys):
    def fail(error):
        raise error
    for error, code, word in ((KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device"), 2, "make room")):
        with pytest.raises(SystemExit) as end:
            common.run(lambda error=error: fail(error))
        assert end.value.code == code and word in capsys.readouterr().err


# ---------------------------------------------------------------- sampling

def test_even_levels_go_from_the_start_to_zero():
    for steps in range(1, 1001):
        levels = np.array(common.even(1000, steps))
        assert len(levels) == steps + 1 and levels[0] == 1000 and levels[-1] == 0 and (np.diff(levels) < 0).all()
        assert abs(np.diff(levels) + 1000 / steps).max() <= 1
    for start in range(1, 40):
        assert common.even(start, start) == list(range(start, -1, -1)) == common.even(start, 1000)
    assert common.even(1000, 50)[:3] == [1000, 980, 960]


def test_noise_comes_in_batches_that_no_picture_notices():
    args = types.SimpleNamespace(net=dict(channels=1, size=4), seed=5, device="cpu")
    noise = [(draw(), draw()) for draw in common.noise_batches(7, args, size=3)]
    assert [len(a) for a, _ in noise] == [3, 3, 1] and args.batches == 3
    alone = common.image_noise((1, 4, 4), 5, 7)
    for k in range(2):
        torch.testing.assert_close(torch.cat([pair[k] for pair in noise]), alone(), rtol=0, atol=0)


def test_watching_counts_evaluations_and_keeps_few_frames():
    args = types.SimpleNamespace(gif=True, batches=1)
    watched = common.watch(lambda xt, t: xt + t, args, most=10)
    for i in range(1000):
        xt = torch.full((20, 1, 2, 2), i / 500 - 1)
        assert torch.equal(watched(xt, 1), xt + 1)
    assert args.evaluations == 20_000 and 10 <= len(args.frames) < 20 and args.frames[0].shape == (16, 1, 2, 2)
    shown = [f[0, 0, 0, 0].item() for f in args.frames]
    assert shown == sorted(shown) and shown[0] == 0 and len(set(np.diff(shown).round(-1))) == 1      # even in time
    args.batches = 2
    watched(torch.zeros(1, 1, 2, 2), 1)
    assert args.evaluations == 20_001 and args.frames[-1].shape == (16, 1, 2, 2)                      # of the first batch alone


def test_slerp_keeps_the_length_and_goes_evenly():
    torch.manual_seed(0)
    x, z = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    z = z * (x.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1))[:, None, None, None]
    way = list(common.slerp(x, z, 5).unflatten(0, (-1, 5)).unbind(1))
    torch.testing.assert_close(way[0], x)
    torch.testing.assert_close(way[-1], z)
    for i in range(2):                                      # each picture by itself
        assert all(w[i].norm().item() == pytest.approx(x[i].norm().item(), rel=1e-12) for w in way)
        angles = [math.acos((a[i] * b[i]).sum() / x[i].norm() ** 2) for a, b in zip(way, way[1:], strict=False)]
        assert angles == pytest.approx([angles[0]] * 4, rel=1e-9)


# ---------------------------------------------------------------- figures and tables

def test_table_of_means_over_seeds(tmp_path, capsys):
    rows = [dict(solver="a", steps=10, seed=s, chamfer=v) for s, v in ((0, 1.0), (1, 3.0))]
    rows += [dict(solver="b", steps=10, seed=0, chamfer=0.123456, emd=2)]
    common.report(rows, ("solver", "steps"), tmp_path / "new" / "table.csv")
    assert capsys.readouterr().out.splitlines() == ["| solver | steps | chamfer | emd |", "|-|-|-|-|", "| a | 10 | 2 ± 1.4 |  |", "| b | 10 | 0.123 | 2 |"]
    with open(tmp_path / "new" / "table.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert [r["chamfer"] for r in kept] == ["1.0", "3.0", "0.123456"] and kept[0]["emd"] == "" and kept[1]["seed"] == "1"


def test_panels_show_what_they_are_given(tmp_path):
    x = common.points("moons", 50, torch.Generator().manual_seed(0))
    figure, axes = common.panels([[x, None], [x, x]], ["left", "right"], ["up", "down"], [[common.RED, None], [x[:, 0], common.BLUE]], limit=3)
    assert axes.shape == (2, 2) and not axes[0, 1].axison and axes[1, 1].get_xlim() == (-3, 3)
    assert [a.get_title() for a in axes.flat] == ["left", "", "", ""] and [a.get_ylabel() for a in axes[:, 0]] == ["up", "down"]
    assert np.array_equal(axes[1, 0].collections[0].get_array(), x[:, 0]) and len(axes[0, 0].collections[0].get_offsets()) == 50
    common.save_figure(figure, tmp_path / "a.png", 3)
    with Image.open(tmp_path / "a.png") as file:
        assert file.text["seed"] == "3"
    common.animate([[x, x], [x + 1, x]], tmp_path / "a.gif", ["t = 0", ["a", "b"]])
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 2 and file.info["duration"] == 80


# ---------------------------------------------------------------- holes in pictures, and measures of a fill

def test_holes(tmp_path, capsys):
    box = common.known_pixels("box", 64)
    assert box.shape == (1, 1, 64, 64) and box.dtype == torch.bool and (~box).sum() == 32 * 32 and not box[0, 0, 16:48, 16:48].any()
    assert common.known_pixels("half", 8)[0, 0].tolist() == [[True] * 4 + [False] * 4] * 8
    assert common.known_pixels("thin", 4)[0, 0].tolist() == [[True] * 4, [False] * 4] * 2
    a = np.full((8, 8), 255, dtype=np.uint8)
    a[2:4] = 0
    Image.fromarray(a).save(tmp_path / "hole.png")
    assert torch.equal(common.known_pixels(str(tmp_path / "hole.png"), 8)[0, 0], torch.from_numpy(a == 255))
    stopped(capsys, lambda: common.known_pixels(str(tmp_path / "hole.png"), 16), "8 x 8", "16 x 16", "--resize")
    assert (~common.known_pixels(str(tmp_path / "hole.png"), 16, resize=True)).sum() == 4 * 16
    for colour in (0, 255):
        Image.new("L", (8, 8), colour).save(tmp_path / "plain.png")
        stopped(capsys, lambda: common.known_pixels(str(tmp_path / "plain.png"), 8), tmp_path / "plain.png", "all" if colour else "none")
    stopped(capsys, lambda: common.known_pixels(str(tmp_path / "none.png"), 8), tmp_path / "none.png", "box, half, thin")


def test_measures_of_a_fill_by_hand():
    torch.manual_seed(0)
    a, where = torch.rand(2, 3, 16, 16) * 2 - 1, torch.ones(1, 1, 16, 16)
    half = where.clone()
    half[..., 8:] = 0
    assert common.psnr(a, a + 0.1, where).tolist() == pytest.approx([20 * math.log10(2 / 0.1)] * 2, rel=1e-4)
    spoiled = torch.cat([a[..., :8], a[..., 8:] + 5], 3)
    assert common.psnr(spoiled, a + 0.1, half).tolist() == pytest.approx([20 * math.log10(2 / 0.1)] * 2, rel=1e-4)     # outside doesn't count
    assert common.ssim(a, a, where).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert common.ssim(a, torch.rand(2, 3, 16, 16) * 2 - 1, where).abs().max() < 0.3
    flat = torch.zeros(1, 1, 16, 16)
    c1 = 0.02 ** 2
    assert common.ssim(flat + 0.5, flat + 0.1, where).item() == pytest.approx((2 * 0.05 + c1) / (0.25 + 0.01 + c1), rel=1e-4)
    known = half > 0
    step = flat.clone()
    step[..., 8:] = 0.3
    assert common.seam(step, known).item() == pytest.approx(0.3, rel=1e-6) and common.seam(step, known.transpose(2, 3)).item() == 0
    assert math.isnan(common.seam(step, torch.ones_like(known)).item())


def test_recorded_and_loglog(tmp_path):
    path, x = [], torch.randn(3, 2)
    f = common.recorded(lambda x, t: x + t[:, None], path)
    assert torch.equal(f(x, torch.full((3,), 7.0)), x + 7)                    # t may be (B,), all the same, or a scalar
    common.recorded(lambda x, t: x, path)(x, torch.tensor(2.0))
    assert [t for t, _ in path] == [7.0, 2.0] and all(torch.equal(kept, x) for _, kept in path)
    common.save_loglog({"a": ([1, 10], [1, 0.1]), "b": ([1, 10], [1, 0.01])}, tmp_path / "x.png", 3, dashed=1, xlabel="NFE")
    with Image.open(tmp_path / "x.png") as file:
        assert file.text["seed"] == "3" and file.size[0] > 500
