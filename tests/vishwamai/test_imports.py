"""What importing costs: no PyTorch, no Transformers, no TensorFlow, no Arrow, no network, no accelerator."""

import subprocess
import sys

SCRIPT = """
import sys
import vishwamai, parsit_jax
from vishwamai import VishwamAI, families
from parsit_jax import Parsit
import vishwamai.cli, vishwamai.convert.to_hf, vishwamai.convert.from_hf
for name in families.names():
    families.get(name)
others = {"torch", "transformers", "tensorflow", "huggingface_hub", "pyarrow", "tensorflow_datasets"}
print(sorted(others & set(sys.modules)))
"""


def test_imports_leave_the_other_frameworks_alone():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_says_what_there_is():
    import parsit_jax
    import vishwamai

    for package, message in [(vishwamai, "vishwamai exports VishwamAI"), (parsit_jax, "parsit_jax exports Parsit")]:
        try:
            package.Nothing  # noqa: B018
        except AttributeError as error:
            assert message in str(error)
        else:
            raise AssertionError("no AttributeError")
