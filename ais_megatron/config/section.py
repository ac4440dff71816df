"""The base class of every section of the configuration: frozen, and strict about names and numbers. (No torch here either.)"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen section. Unknown keys are errors, because otherwise a typo would silently leave a default in use.

    nan and inf are errors for every float key. They pass bounds such as ``gt=1`` and turn the loss into nan. A written
    configuration would hold null in their place, which cannot be loaded again. A key for which inf has a meaning can allow it
    with ``Field(allow_inf_nan=True)``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
