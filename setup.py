"""The package, its dependency ranges and its command. `requirements.txt` pins what was tested."""

import shutil
from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = run_path(str(ROOT / "megatron_ds" / "shipped.py"))


class BuildWithShippedFiles(build_py):
    """Copy ds_configs/ and examples/ into the package, where `megatron_ds/shipped.py` finds them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # the clone has them
        for folder in SHIPPED["FOLDERS"]:
            target = Path(self.build_lib, "megatron_ds", SHIPPED["SHARE"], folder)
            shutil.copytree(ROOT / folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


# Packages that a run, a command or `make docs` needs only if it asks for them. A message about a missing one names the
# extra: pip install 'megatron-ds[wandb]'.
EXTRAS = {
    "tensorboard": ["tensorboard>=2.20"],
    "wandb": ["wandb>=0.31"],
    "mlflow": ["mlflow-skinny>=3.10"],
    "trackio": ["trackio>=0.40"],
    "remote": ["fsspec>=2026.2", "s3fs>=2026.2", "gcsfs>=2026.2"],
    "eval": ["lm-eval>=0.4.11,<0.5"],
    "gguf": ["gguf>=0.17"],
    "bitsandbytes": ["bitsandbytes>=0.50"],
    "nvml": ["nvidia-ml-py>=13"],
}
DOCS = ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1,<2"]

setup(
    name="megatron-ds",
    version=run_path(str(ROOT / "megatron_ds" / "version.py"))["__version__"],
    description="Megatron's tensor and pipeline parallelism on DeepSpeed's engine, Hugging Face checkpoints in and out",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "deepspeed",
        "megatron",
        "transformers",
        "tensor parallelism",
        "pipeline parallelism",
        "pretraining",
        "LLM",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ds", "megatron_ds.*"]),
    package_data={"megatron_ds": ["py.typed", "hf/proof.json", "planner/profiles/*/*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.15",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<6",
        "huggingface_hub>=2.4,<3",
        "datasets>=5.2,<6",
        "safetensors>=0.8,<1",
        "sentencepiece>=0.2",
        "protobuf>=5",
        "xxhash>=3",
        "peft>=0.21,<1",
        "pydantic>=2.14,<3",
        "PyYAML>=6",
        "numpy>=2",
        "filelock>=3",
        "typer>=0.29,<1",
        "rich>=15,<16",
        "matplotlib>=3.11,<4",
    ],
    extras_require={**EXTRAS, "all": [line for extra in EXTRAS.values() for line in extra], "docs": DOCS},
    cmdclass={"build_py": BuildWithShippedFiles},
    entry_points={"console_scripts": ["megatron-ds = megatron_ds.cli.main:main"]},
)
