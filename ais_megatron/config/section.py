"""What every section of the configuration is: frozen, and strict about names and numbers. (See `config`; no torch here either.)"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Frozen, and unknown keys are errors: a typo must never silently leave a default in force.

    nan and inf are errors for every float key. They pass bounds such as ``gt=1``, they turn the loss into nan, and a written
    configuration would hold null in their place, which cannot be loaded again. A key for which inf means something allows it
    with ``Field(allow_inf_nan=True)``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
