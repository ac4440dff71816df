"""What every section of the configuration is: frozen, and strict about names. (See `config`; no torch here either.)"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Frozen, and unknown keys are errors: a typo must never silently leave a default in force."""

    model_config = ConfigDict(frozen=True, extra="forbid")


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
