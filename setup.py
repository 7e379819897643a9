from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = next(
    line.split('"')[1] for line in (root / "fastcnn/__init__.py").read_text().splitlines() if "__version__ =" in line
)


# git keeps no empty folders
kernels = [f"fastcnn.kernels.{name}" for name in ("triton", "cuda", "cpu") if (root / "kernels" / name).is_dir()]

setup(
    name="fastcnn",
    version=version,
    description="Hand-written Triton, CUDA and numba kernels for training convolutional networks in PyTorch",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # kernels/ must not install as a top-level name (another project owns it): it becomes fastcnn.kernels, and
    # benchmarks/ fastcnn.benchmarks
    packages=find_packages(include=["fastcnn", "fastcnn.*"], exclude=["fastcnn.kernels", "fastcnn.benchmarks"])
    + ["fastcnn.kernels", *kernels, "fastcnn.benchmarks"],
    package_dir={"fastcnn.kernels": "kernels", "fastcnn.benchmarks": "benchmarks"},
    package_data={"fastcnn.kernels.cuda": ["*.cu", "*.cuh"], "fastcnn.benchmarks": ["shapes.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numba>=0.63",
        "numpy",
        "safetensors",
        # the trainer and the command line
        "filelock",
        "jsonargparse>=4.40",
        "matplotlib",
        "pillow>=10.1",
        "scikit-learn",
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        # networks to measure beside ours, and the benchmarks as pytest cases
        "bench": ["pytest", "pytest-benchmark", "timm", "torchvision"],
        "test": ["fastcnn[bench]", "pytest-xdist", "expecttest", "hypothesis", "ruff", "build"],
    },
    entry_points={"console_scripts": ["fastcnn = fastcnn.cli:main"]},
)
