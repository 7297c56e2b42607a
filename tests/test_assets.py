"""What ships in assets/: weights that the scripts load, small enough, every file named where its origin is told."""
import pathlib

import pytest
import torch
from PIL import Image

import cfg_afhq
import ddpm_afhq

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
PICTURES = sorted(p.name for p in ASSETS.iterdir() if p.suffix in (".png", ".gif"))


def test_all_is_small_and_each_file_is_shown_or_explained():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) < 48 * 2 ** 20
    said = (ASSETS / "README.md").read_text() + (ASSETS.parent / "README.md").read_text()
    assert [p.name for p in ASSETS.iterdir() if p.name not in said] == []


def test_faces_to_start_from_are_four_of_each_class():
    files = sorted((ASSETS / "faces").iterdir())
    assert [p.name for p in files] == [f"{name}_{i}.png" for name in ("cat", "dog", "wild") for i in range(4)]
    for path in files:
        with Image.open(path) as picture:
            assert picture.size == (64, 64) and picture.mode == "RGB" and picture.text["command"].startswith("python cfg_afhq.py")


@pytest.mark.parametrize(("script", "extra"), [(cfg_afhq, {"classes"}), (ddpm_afhq, set())], ids=["cfg_afhq", "ddpm_afhq"])
def test_weights_are_halves_that_fit_the_default_network(script, extra):
    kept = torch.load(ASSETS / f"{script.__name__}.pt", weights_only=True)
    assert set(kept) == {"script", "net", "method", "names", "iter", "ema"} and kept["script"] == script.__name__
    assert all(w.dtype == torch.float16 and w.isfinite().all() for w in kept["ema"].values())
    script.UNet(**kept["net"]).load_state_dict(kept["ema"])
    args = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(script.parse_args([])).items()}
    assert {k: v for k, v in kept["net"].items() if k not in extra | {"channels"}} == {k: args[k] for k in kept["net"] if k not in extra | {"channels"}}
    assert kept["method"] == {k: args[k] for k in ("schedule", "predict", "weight", "T")}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_of_a_size_for_a_page(name):
    with Image.open(ASSETS / name) as picture:
        picture.load()
        assert 120 <= picture.width <= 1600 and 60 <= picture.height <= 1400
    assert (ASSETS / name).stat().st_size < 2 * 2 ** 20
