"""What all parts of the configuration have in common.

Knows that an unknown key is an error, and so is a wrong default. Knows no key.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)
