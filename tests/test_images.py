"""IDX files, the fixed splits, and binarisation."""

import gzip
import sys

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.utils.data import DataLoader

from pyro_vi_ext import fit
from pyro_vi_ext.models.deep_vae import DeepVAE
from pyro_vi_ext.models.images import (
    DynamicallyBinarized,
    binarize,
    load_digits,
    load_images,
    load_mnist,
    load_static_mnist,
)

pytestmark = pytest.mark.usefixtures("float64")

ROWS, COLUMNS = 3, 2


def idx(values, magic):
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return magic.to_bytes(4, "big") + sizes + bytes(values.flatten().tolist())


def write(folder, zipped=True, train=5, test=40):
    """Four small IDX files, and what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {}
    for split, prefix, n in (("train", "train", train), ("test", "t10k", test)):
        images = torch.randint(256, (n, ROWS, COLUMNS), dtype=torch.uint8)
        labels = torch.randint(10, (n,), dtype=torch.uint8)
        held[split] = images, labels.long()
        for name, data in (
            (f"{prefix}-images-idx3-ubyte", idx(images, 2051)),
            (f"{prefix}-labels-idx1-ubyte", idx(labels, 2049)),
        ):
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(data) if zipped else data)
    return held


# --- MNIST ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", [".", "raw", "MNIST/raw"])
def test_idx_files_are_read_back(tmp_path, zipped, below):
    held = write(tmp_path / below, zipped)
    for folder in (tmp_path, str(tmp_path)):
        for split, (images, labels) in held.items():
            found = load_mnist(folder, split)
            assert found[0].dtype == torch.uint8 and found[0].equal(images)
            assert found[1].dtype == torch.int64 and found[1].equal(labels)


def test_images_are_scaled_flat_and_the_test_set_shuffled(tmp_path):
    held = write(tmp_path)
    data = load_images(tmp_path)
    assert data.shape == (ROWS, COLUMNS) and data.x_train.dtype == torch.get_default_dtype()
    assert data.x_train.equal(held["train"][0].flatten(1) / torch.tensor(255.0))
    assert data.y_train.equal(held["train"][1])
    images, labels = held["test"]
    pairs = {(tuple(i.flatten().tolist()), int(y)) for i, y in zip(images, labels, strict=True)}
    shuffled = (data.x_test * 255).round().long()
    found = [(tuple(i.tolist()), int(y)) for i, y in zip(shuffled, data.y_test, strict=True)]
    assert set(found) == pairs and len(found) == 40
    assert not shuffled.equal(images.flatten(1).long())
    torch.manual_seed(9)
    assert load_images(tmp_path).x_test.equal(data.x_test)


def test_a_missing_file_says_what_is_looked_for_and_where(tmp_path):
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    load_mnist(tmp_path, "train")
    with pytest.raises(FileNotFoundError) as error:
        load_mnist(tmp_path, "test")
    message = str(error.value)
    assert "t10k-labels-idx1-ubyte.gz" in message
    for place in (tmp_path, tmp_path / "raw", tmp_path / "MNIST" / "raw"):
        assert str(place) in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "magic number 0, expected 2051"),
        (lambda raw: b"\0\0\x0d\3" + raw[4:], "magic number 3331, expected 2051"),
        (lambda raw: b"\0\0\x08\1" + raw[4:], "magic number 2049, expected 2051"),
        (lambda raw: raw[:-1], "29 bytes of values.*5 x 3 x 2 = 30"),
        (lambda raw: raw + b"\0", "31 bytes of values"),
        (lambda raw: raw[:7], "Fetch it anew"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    write(tmp_path, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte' .*{message}"):
        load_mnist(tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"not zipped"])
def test_damaged_gzip_files_are_named(tmp_path, damage):
    write(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"ubyte\.gz' is no complete gzip file"):
        load_mnist(tmp_path)


def test_images_and_labels_of_different_sets(tmp_path):
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(torch.zeros(4, dtype=torch.uint8), 2049))
    )
    with pytest.raises(ValueError, match="4 labels and .* 5 images"):
        load_mnist(tmp_path)


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        load_mnist(tmp_path, "valid")


# --- digits --------------------------------------------------------------------------------------


def test_digits_are_split_at_random_and_always_alike():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    data = load_digits()
    assert data.x_train.shape == (1500, 64) and data.x_test.shape == (297, 64)
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    assert x.dtype == torch.get_default_dtype() and y.dtype == torch.int64
    rows = {(*row.tolist(), int(label)) for row, label in zip(x * 16, y, strict=True)}
    expected = {(*r, t) for r, t in zip(digits.data.tolist(), digits.target.tolist(), strict=True)}
    assert rows == expected
    # The digits come in runs of one writer; a random split has each class in proportion.
    share = torch.bincount(data.y_test, minlength=10) / torch.bincount(y)
    assert ((share - 297 / 1797).abs() < 4 * (0.165 * 0.835 / 180) ** 0.5).all()
    assert load_images().x_test.equal(data.x_test)
    assert y[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]  # of this very split


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install pyro_vi_ext\[data\]"):
        load_images()


# --- binarisation --------------------------------------------------------------------------------


def test_pixels_have_their_grey_value_as_probability():
    grey = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    draws = binarize(grey.expand(40_000, 5))
    assert draws.unique().tolist() == [0.0, 1.0] and draws.dtype == grey.dtype
    se = (grey * (1 - grey) / 40_000).sqrt()
    assert ((draws.mean(0) - grey).abs() <= 4 * se).all()


def test_a_generator_makes_a_static_binarisation():
    grey = torch.rand(20, 6)
    state = torch.get_rng_state()
    a, b = (binarize(grey, torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.equal(b) and state.equal(torch.get_rng_state())
    assert not binarize(grey).equal(binarize(grey))


@pytest.mark.parametrize("make", [binarize, DynamicallyBinarized])
def test_what_is_no_grey_value(make):
    with pytest.raises(ValueError, match=r"found torch.uint8.*images / 255"):
        make(torch.zeros(2, 3, dtype=torch.uint8))
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"found {bad:g} \(1 of 6 pixels"):
            make(torch.tensor([[0.0, 1.0, 0.5], [0.2, bad, 0.1]]))


def test_each_access_draws_anew():
    data = DynamicallyBinarized(torch.full((4, 50), 0.5))
    assert len(data) == 4
    (a, i), (b, j) = data[2], data[2]
    assert i == j == 2 and not a.equal(b)
    first, second = (torch.stack([x for x, _ in data.__getitems__([0, 3])]) for _ in range(2))
    assert first.shape == (2, 50) and not first.equal(second)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_gives_rows_with_their_positions(shuffle):
    grey = torch.eye(10)  # grey values of 0 and 1: the draw is the image
    loader = DataLoader(DynamicallyBinarized(grey), batch_size=4, shuffle=shuffle)
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert all(x.equal(grey[index]) and index.dtype == torch.int64 for x, index in batches)
    assert torch.cat([index for _, index in batches]).sort().values.equal(torch.arange(10))


def test_training_resumes_bit_for_bit(tmp_path):
    grey = torch.rand(12, 6)

    def run(num_steps, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        vae = DeepVAE(6, (2,), ((3,),))
        loader = DataLoader(DynamicallyBinarized(grey), batch_size=5, shuffle=True)
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        result = fit(svi, loader, size=12, num_steps=num_steps, progress=False, **options)
        return result.losses, torch.cat([p.detach().flatten() for p in vae.parameters()])

    losses, parameters = run(9)
    run(4, checkpoint=tmp_path / "run.pt")
    resumed = run(9, checkpoint=tmp_path / "run.pt")
    assert resumed[0].equal(losses) and resumed[1].equal(parameters)


# --- MNIST binarised once -------------------------------------------------------------------------


def write_static(path, dtype=np.uint8, width=784, without=()):
    """A small file of packed bits, and the bits."""
    generator = np.random.default_rng(0)
    sizes = {"train": 5, "valid": 3, "test": 40}
    held = {k: generator.integers(2, size=(n, width), dtype=np.uint8) for k, n in sizes.items()}
    packed = {k: np.packbits(v, axis=1).astype(dtype) for k, v in held.items() if k not in without}
    np.savez_compressed(path, **packed)
    return {k: torch.from_numpy(v).to(torch.get_default_dtype()) for k, v in held.items()}


def test_static_images_are_unpacked_and_the_test_set_shuffled(tmp_path):
    path = tmp_path / "static.npz"
    held = write_static(path)
    for place in (path, str(path)):
        x_train, x_valid, x_test = load_static_mnist(place)
        assert x_train.equal(held["train"]) and x_valid.equal(held["valid"])
        assert x_test.dtype == torch.get_default_dtype() and not x_test.equal(held["test"])
        assert sorted(x_test.tolist()) == sorted(held["test"].tolist())
    torch.manual_seed(9)
    assert load_static_mnist(path)[2].equal(x_test)


def test_static_images_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        load_static_mnist(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"not an archive",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:200] + bytes(100) + raw[300:],
    ],
)
def test_damaged_static_images_are_named(tmp_path, damage):
    path = tmp_path / "static.npz"
    write_static(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"static\.npz' is no complete NumPy file"):
        load_static_mnist(path)


def test_other_files_are_no_static_images(tmp_path):
    path = tmp_path / "static.npz"
    write_static(path, without=("valid",))
    with pytest.raises(ValueError, match=r"no complete NumPy file .*valid"):
        load_static_mnist(path)
    with (tmp_path / "array.npy").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"array\.npy' is no complete NumPy file"):
        load_static_mnist(tmp_path / "array.npy")
    for options, message in (
        ({"width": 64}, r"train is uint8 of shape \(5, 8\), expected uint8 of shape \(N, 98\)"),
        ({"dtype": np.float32}, "train is float32"),
    ):
        write_static(path, **options)
        with pytest.raises(ValueError, match=message):
            load_static_mnist(path)
