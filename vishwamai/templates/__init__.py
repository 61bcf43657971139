"""Chat templates that come with the project.

`qwen3.jinja` is Qwen3's released template, character for character (Copyright the Qwen team, Alibaba Cloud;
Apache-2.0), without a comment of ours, so that it equals the one in a Qwen3 checkpoint.
"""

from importlib.resources import files


def load_template(name: str) -> str:
    """The Jinja source of `<name>.jinja` in this folder."""
    return files(__package__).joinpath(f"{name}.jinja").read_bytes().decode("utf-8")
