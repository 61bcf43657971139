"""Packaging: `pip install -e .[cpu]` (or [cuda], [tpu]); extras [torch] and [test]."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vishwamai",
    version="0.1.0",
    description="Language and document models on TPU pods with JAX",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["kernels*", "vishwamai*", "parsit_jax*"]),
    package_data={"vishwamai": ["templates/*.jinja"]},
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18",
        "tokenizers>=0.22",
        "sentencepiece>=0.2.3",
        "jinja2>=3.1.6",
        "einops>=0.8",
        "numpy>=2.0",
        "pillow>=11",
        "pypdfium2>=4.30",
        "safetensors>=0.6",
        "huggingface-hub>=0.34",
        "pydantic>=2.10",
        "pyyaml>=6.0",
        "jaxtyping>=0.3",
        "rich>=13",
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
        "font-roboto",
        "font-source-sans-pro",
        "font-source-serif-pro",
        "font-caladea",
        "font-lato",
    ],
    extras_require={
        "cpu": [],
        "cuda": ["jax[cuda]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "torch": ["torch==2.13.0; python_version == '3.11'", "transformers>=5.0; python_version == '3.11'"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2",
            "hypothesis>=6",
            "ruff==0.17.5",
            "import-linter>=2.5",
            "torch==2.13.0; python_version == '3.11'",
            "transformers>=5.0; python_version == '3.11'",
        ],
    },
    entry_points={
        "console_scripts": ["vishwamai=vishwamai.cli:main"],
        "vishwamai.families": [
            "qwen3=vishwamai.models.qwen3:FAMILY",
            "siglip=parsit_jax.models.siglip_family:FAMILY",
            "parsit=parsit_jax.models.parsit_family:FAMILY",
        ],
    },
)
