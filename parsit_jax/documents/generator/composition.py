"""What a kind of document hands to the generator: a placed page and what can be asked about it."""

from dataclasses import dataclass, field

from parsit_jax.documents.generator.document import Question
from parsit_jax.documents.generator.page import Page


@dataclass(frozen=True)
class Composition:
    """A page, the questions about it and its fields by name."""

    page: Page
    questions: tuple[Question, ...] = ()
    fields: dict[str, str] = field(default_factory=dict)
