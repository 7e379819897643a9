"""Data sets by name: `load_data("digits")`, `load_data("mnist", "folder/with/the/files")`."""

from fastcnn.data.cifar import load_cifar
from fastcnn.data.dataset import Data, Input, batches
from fastcnn.data.digits import load_digits
from fastcnn.data.folder import load_folder
from fastcnn.data.image import read_image
from fastcnn.data.mnist import load_mnist
from fastcnn.names import check_name

__all__ = ["DATA", "Data", "Input", "batches", "load_data", "read_image"]

DATA = ("digits", "mnist", "cifar10", "cifar100", "folder")


def load_data(name, data_dir=None, *, image_size=32, channels=3):
    """Load a data set.

    Args:
        name: one of `DATA`.
        data_dir: where its files are, default data/NAME; "digits" needs none.
        image_size, channels: for "folder": what its images are brought to.

    Returns:
        `Data`.

    Raises:
        ValueError: no such data set (the nearest name is suggested), files that are absent (which, where, in what
            format), or files that are damaged (which, how).
    """
    check_name("data set", name, DATA)
    if name == "digits":
        return load_digits()
    data_dir = data_dir or f"data/{name}"
    if name == "mnist":
        return load_mnist(data_dir)
    if name == "folder":
        return load_folder(data_dir, image_size, channels)
    return load_cifar(name, data_dir)
