"""What the generator returns: a page's image, what is printed on it, and questions with their answers."""

from dataclasses import dataclass
from enum import Enum

from PIL import Image


class Split(Enum):
    """The side a document is on: the values, layouts and fonts of the two never meet."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True)
class Question:
    """A question about one field. `answer` is exactly what is printed on the page."""

    text: str
    answer: str
    field: str


@dataclass(frozen=True)
class Document:
    """A drawn page.

    `transcription` holds the printed lines from top to bottom, cells of a line joined by one space;
    `fields` maps a field's name to its printed value.
    """

    image: Image.Image
    kind: str
    layout: str
    font: str
    transcription: str
    questions: tuple[Question, ...]
    fields: dict[str, str]
