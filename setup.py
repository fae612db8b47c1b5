"""Packaging of ds_moe. The version is read as text, so that building needs none of the dependencies."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "ds_moe/__init__.py").read_text(), re.M).group(1)
README = ROOT / "README.md"

setup(
    name="ds-moe",
    version=VERSION,
    description="Train Mixture-of-Experts vision-language models with expert parallelism on DeepSpeed",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    author="the ds_moe authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["ds_moe", "ds_moe.*"]),
    # A link to ds_configs/, whose files a wheel gets: the DeepSpeed JSONs that run files name, and run files.
    package_data={"ds_moe": ["ds_configs/*.json", "ds_configs/runs/*.yaml"]},
    python_requires=">=3.11",
    entry_points={"console_scripts": ["ds-moe = ds_moe.cli:main"]},
    # Ranges say what the code is written for; constraints.txt pins what was tested. torch comes first: pick the build
    # for your CUDA (or CPU) and install it before this package, since DeepSpeed's source package imports it to build.
    install_requires=[
        "torch>=2.11,<2.16",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<5.25",
        "peft>=0.21.2,<0.22",
        "datasets>=5.2,<6",
        "safetensors>=0.8",
        "tensorboard>=2.20",
        "pydantic>=2.12,<3",
        "pyyaml>=6.0",
        "rich>=14",
        "pillow>=12",
        "numpy>=2.3",
        "matplotlib>=3.10",
        "shtab>=1.7",  # completion in shells
        "scikit-learn>=1.7",  # scores of a gate; the demo's images are its scans of handwritten digits
    ],
    extras_require={
        "dev": [
            "pytest>=9",
            "pytest-timeout>=2.4",
            "hypothesis>=6.150",
            "psutil>=7",
            "ruff==0.17.5",  # a formatter's opinion changes between versions
            "pyright[nodejs]>=1.1.414",  # Node from PyPI: no download outside the package index
        ],
        "video": ["av>=15"],  # records with encoded videos; its wheels bring FFmpeg's libraries
        # CUDA builds of torch bring the triton they were built with; this is for machines whose torch does not.
        "triton": ["triton>=3.7; platform_system == 'Linux'"],
        "liger": ["liger-kernel>=0.8.5,<0.9; platform_system == 'Linux'"],  # moe.experts.backend: liger
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
