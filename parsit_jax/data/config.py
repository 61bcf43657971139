"""The `data:` section of a document model."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from parsit_jax.documents.generator import KINDS
from vishwamai.config import Config
from vishwamai.data.mixture import all_or_none
from vishwamai.data.pool import TooLong
from vishwamai.data.sources import FilesConfig

# Fields that belong to one sort of dataset only.
_OF_FILES = ("sampling_strategy", "image_folder")
_OF_PAGES = ("task", "max_questions", "skip_blank_patches")


class Task(StrEnum):
    """What is asked of a generated page."""

    QUESTIONS = "questions"  # its fields, one turn each
    TRANSCRIBE = "transcribe"  # all that is printed
    CONTINUE = "continue"  # its lines in random order: given the beginning, what follows


class PageFiles(FilesConfig):
    """Files of conversations about images."""

    image_folder: str | None = Field(None, description="where image paths start; null: the file's own folder")


class DatasetConfig(PageFiles):
    """Conversations from files, or about pages that are drawn as they are needed."""

    json_path: str | None = Field(None, description=FilesConfig.model_fields["json_path"].description)
    generated: str | None = Field(None, description=f"instead of files: pages to draw: {', '.join(KINDS)}")
    task: Task = Field(
        Task.QUESTIONS, description="of a drawn page: questions about its fields, transcribe, or continue (lines)"
    )
    max_questions: int | None = Field(None, gt=0, description="questions about a drawn page; null: all that fit")
    skip_blank_patches: bool = Field(
        False,
        description="of a drawn page only the patches with ink: more pages share a row. For pre-training: elsewhere a "
        "page is whole",
    )
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="share of the rows; where no dataset has one, files are shuffled together",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.json_path is None) == (self.generated is None):
            raise ValueError("a dataset has either json_path or generated")
        if self.generated is not None and self.generated not in KINDS:
            raise ValueError(f"generated={self.generated!r} is no kind of document: choose one of {', '.join(KINDS)}")
        for name in _OF_FILES if self.generated else _OF_PAGES:
            # By value: a resolved config says every field.
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning for {'drawn pages' if self.generated else 'files'}")
        return self


class ParsitData(Config):
    """What a document model learns from."""

    max_length: int = Field(gt=0, description="tokens of a row, T; image tokens count")
    max_patches: int | None = Field(None, gt=0, description="image patches of a row, P; null: one image")
    image_size: tuple[int, int] | None = Field(
        None, description="height and width that images are brought to; null: the vision tower's own"
    )
    datasets: list[DatasetConfig] = Field(min_length=1, description="what is learned from, mixed by weight")
    too_long: TooLong = Field(
        TooLong.ERROR, description="examples longer than a row: error, or skip (counted in the log)"
    )

    @model_validator(mode="after")
    def _weights(self) -> Self:
        all_or_none(self.datasets)
        endless = any(dataset.generated for dataset in self.datasets)
        if endless and len(self.datasets) > 1 and self.datasets[0].weight is None:
            raise ValueError("generated pages never end: beside other datasets every dataset needs a weight")
        return self
