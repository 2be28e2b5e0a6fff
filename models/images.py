r"""Images for the deep models: MNIST from its IDX files, scikit-learn's digits, binarisation.

.. math:: x_{id} \sim \mathrm{Bernoulli}(g_{id}), \quad g_{id} \in [0, 1]
    \text{ the grey value of pixel } d \text{ of image } i.

A new draw each time an image is used is *dynamic* binarisation, the convention of the
importance-weighted autoencoder (Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519); one draw
kept for good is a *static* one. The two give different log-likelihoods and must not be compared.
"""

import gzip
import math
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = [
    "DynamicallyBinarized",
    "ImageData",
    "binarize",
    "load_digits",
    "load_images",
    "load_mnist",
    "load_static_mnist",
]

_PREFIX = {"train": "train", "test": "t10k"}

# What NumPy raises for a file that is no archive, or a damaged one, or has other arrays.
_UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class ImageData(NamedTuple):
    """Images and labels, split into a training and a test set.

    Attributes:
        x_train: grey values in [0, 1], shape (N, D), torch's default dtype, on the CPU.
        y_train: labels, shape (N,), int64.
        x_test: grey values of the test images, shape (M, D).
        y_test: labels of the test images, shape (M,).
        shape: height and width of an image; D is their product.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    shape: tuple[int, int]


def load_images(folder: str | Path | None = None) -> ImageData:
    """Return MNIST if its folder is given, and scikit-learn's small digits otherwise.

    The test images come in a shuffled order that is the same for everybody, so that the first n of
    them are a fair sample: the first half of MNIST's own test file is easier than the second. The
    training images of MNIST have the order of the file.

    Args:
        folder: where the files of :func:`load_mnist` are; None for :func:`load_digits`.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_mnist`.
        ImportError: as :func:`load_digits`.

    Example:
        >>> data = load_images()
        >>> data.x_test.shape, data.shape
        (torch.Size([297, 64]), (8, 8))
    """
    if folder is None:
        return load_digits()
    images, y_train = load_mnist(folder, "train")
    test_images, y_test = load_mnist(folder, "test")
    order = _fixed_permutation(len(y_test))
    x_train, x_test = (_grey_values(i, 255.0) for i in (images, test_images[order]))
    return ImageData(x_train, y_train, x_test, y_test[order], tuple(images.shape[1:]))


def load_digits() -> ImageData:
    """Return the 8 x 8 digits that come with scikit-learn: 1500 to train, 297 to test.

    Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI repository (1998). Grey
    values 0, ..., 16 are divided by 16; the split is random and the same for everybody.

    Raises:
        ImportError: without scikit-learn.

    Example:
        >>> data = load_digits()
        >>> data.x_train.shape, data.y_train.shape, float(data.x_train.max())
        (torch.Size([1500, 64]), torch.Size([1500]), 1.0)
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "load_digits needs scikit-learn: pip install pyro_vi_ext[data]"
        ) from error
    digits = datasets.load_digits()
    order = _fixed_permutation(len(digits.target))
    x = _grey_values(torch.from_numpy(digits.images[order]), 16.0)
    y = torch.from_numpy(digits.target[order]).long()
    return ImageData(x[:1500], y[:1500], x[1500:], y[1500:], (8, 8))


def load_mnist(folder: str | Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """Read the handwritten digits of LeCun, Cortes and Burges from their original IDX files.

    The files ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``
    and ``t10k-labels-idx1-ubyte``, as they are or with the ending ``.gz``, are looked for in
    `folder`, in `folder`/raw and in `folder`/MNIST/raw, where torchvision puts them. Data sets in
    the same format (Fashion-MNIST) can be read too.

    Args:
        folder: where to look.
        split: ``"train"`` or ``"test"``.

    Returns:
        Images, uint8, shape (N, 28, 28), and labels, int64, shape (N,), in the files' order.

    Raises:
        FileNotFoundError: if a file is not there; says what was looked for and where.
        ValueError: for another `split`, and for a file that is damaged or of another kind; names
            the file.

    Example:
        >>> load_mnist("no/such/folder", split="test")
        Traceback (most recent call last):
        FileNotFoundError: Found neither t10k-images-idx3-ubyte nor t10k-images-idx3-ubyte.gz in ...
    """
    if split not in _PREFIX:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    images = _read_idx(_find(folder, f"{_PREFIX[split]}-images-idx3-ubyte"), num_dims=3)
    path = _find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte")
    labels = _read_idx(path, num_dims=1)
    if len(labels) != len(images):
        raise ValueError(
            f"'{path}' has {len(labels)} labels and the file of the images beside it "
            f"{len(images)} images: they are of different data sets. Fetch both anew."
        )
    return images, labels.long()


def load_static_mnist(path: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """Read MNIST as it was binarised once for all: 50,000 to train, 10,000 to validate and to test.

    The draw of Salakhutdinov and Murray (2008) in the split of Larochelle, from a file of NumPy
    with the arrays ``train``, ``valid`` and ``test``, eight pixels to a byte:
    ``np.savez_compressed(path, train=np.packbits(x_train, axis=1), ...)`` writes one from rows of
    784 zeros and ones. The test images of the original file are sorted by class; here they come in
    a shuffled order that is the same for everybody, so that the first n are a fair sample.

    Args:
        path: of the file.

    Returns:
        Images to train, to validate and to test: zeros and ones, shape (N, 784), torch's default
        dtype, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is damaged or of another kind; names the file.

    References:
        Salakhutdinov and Murray 2008, On the quantitative analysis of deep belief networks, ICML.

    Example:
        >>> load_static_mnist("no/such/static_mnist.npz")
        Traceback (most recent call last):
        FileNotFoundError: ... 'no/such/static_mnist.npz'
    """
    try:
        with np.load(path) as file:
            packed = [file[split] for split in ("train", "valid", "test")]
    except _UNREADABLE as error:
        raise ValueError(
            f"'{path}' is no complete NumPy file with the arrays train, valid and test ({error}). "
            "Fetch it anew."
        ) from error
    for split, bits in zip(("train", "valid", "test"), packed, strict=True):
        if bits.dtype != np.uint8 or bits.ndim != 2 or bits.shape[1] != 98:
            raise ValueError(
                f"'{path}': the array {split} is {bits.dtype} of shape {bits.shape}, expected "
                "uint8 of shape (N, 98): np.packbits(x, axis=1) of x with 784 columns."
            )
    packed[2] = packed[2][_fixed_permutation(len(packed[2]))]
    x_train, x_valid, x_test = (
        torch.from_numpy(np.unpackbits(bits, axis=1)).to(torch.get_default_dtype())
        for bits in packed
    )
    return x_train, x_valid, x_test


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw each pixel from a Bernoulli distribution with its grey value as probability.

    Args:
        images: grey values in [0, 1], any shape, floating-point.
        generator: source of randomness, for a static binarisation; torch's global one if None.

    Returns:
        Zeros and ones of the shape, dtype and device of `images`.

    Raises:
        ValueError: for integers, and for values outside [0, 1] or NaN.

    Example:
        >>> binarize(torch.tensor([[0.0, 1.0, 1.0]]))
        tensor([[0., 1., 1.]])
        >>> static = binarize(load_digits().x_test, torch.Generator().manual_seed(0))
        >>> static.unique().tolist()
        [0.0, 1.0]
    """
    _check_grey(images)
    return torch.bernoulli(images, generator=generator)


class DynamicallyBinarized(Dataset):
    """Data set of pairs (x, index), binarised anew at each access.

    For a ``DataLoader``, whose batches are the first two arguments of a
    :class:`~pyro_vi_ext.models.deep_vae.DeepVAE`'s model and guide: x of shape (B, D), and the
    positions of its rows among all images, shape (B,). A batch costs one draw, not B. The draws
    come from torch's global random state, so ``fit`` resumes them exactly; leave the loader's
    ``num_workers`` at 0.

    Args:
        images: grey values in [0, 1], shape (N, D), floating-point.

    Raises:
        ValueError: as :func:`binarize`.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> data = DynamicallyBinarized(load_digits().x_train)
        >>> x, index = next(iter(DataLoader(data, batch_size=100, shuffle=True)))
        >>> x.shape, index.shape, x.unique().tolist()
        (torch.Size([100, 64]), torch.Size([100]), [0.0, 1.0])
    """

    def __init__(self, images: Tensor):
        _check_grey(images)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.bernoulli(self.images[index]), index

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """The pairs of a batch: what a ``DataLoader`` asks for instead of one after another."""
        return list(zip(torch.bernoulli(self.images[indices]).unbind(), indices, strict=True))


# --- helpers -----------------------------------------------------------------------------------


def _grey_values(images: Tensor, largest: float) -> Tensor:
    return images.reshape(len(images), -1).to(torch.get_default_dtype()) / largest


def _fixed_permutation(size: int) -> np.ndarray:
    """A random order that no version of NumPy changes: its legacy generator is frozen."""
    return np.random.RandomState(0).permutation(size)


def _check_grey(images: Tensor) -> None:
    if not images.is_floating_point():
        raise ValueError(
            f"images must be grey values in [0, 1], found {images.dtype}: divide by the largest "
            "value, images / 255.0."
        )
    bad = ~((images >= 0) & (images <= 1))  # NaN is bad too
    if bad.any():
        raise ValueError(
            f"images must be grey values in [0, 1], found {images[bad][0]:g} ({int(bad.sum())} of "
            f"{bad.numel()} pixels are outside): divide by the largest value, images / 255.0."
        )


def _find(folder: str | Path, name: str) -> Path:
    folder = Path(folder)
    places = [folder, folder / "raw", folder / "MNIST" / "raw"]
    for place in places:
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"Found neither {name} nor {name}.gz in {', '.join(f'{place}' for place in places)}. Put "
        "the four files of MNIST there, or leave out the folder for scikit-learn's digits: "
        "load_images()."
    )


def _read_idx(path: Path, num_dims: int) -> Tensor:
    """An IDX file: the bytes 0, 0, 8 (for uint8), number of dims; the dims, int32; the values."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"'{path}' is no complete gzip file ({error}). Fetch it anew."
            ) from error
    magic, expected = data[:4], bytes([0, 0, 8, num_dims])
    if magic != expected:
        raise ValueError(
            f"'{path}' starts with the magic number {int.from_bytes(magic, 'big')}, expected "
            f"{int.from_bytes(expected, 'big')}, an IDX file of uint8 with {num_dims} "
            f"dimension{'s' if num_dims > 1 else ''}. Fetch it anew."
        )
    start = 4 + 4 * num_dims
    sizes = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) != start + math.prod(sizes):
        raise ValueError(
            f"'{path}' has {len(data) - start} bytes of values, its header says "
            f"{' x '.join(map(str, sizes))} = {math.prod(sizes)}. Fetch it anew."
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).copy()).reshape(sizes)
