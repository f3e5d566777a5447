"""The part of the configuration about losses: may clients upload some, and which does the operator allow.

Knows names, pins and paths. Does not know how a loss is fetched (hub/losses.py) or run (engine/).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from twinkle_serve.strict import Strict

_Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class LossTerms(Strict):
    """What a loss is called and reads: the ``loss.json`` beside its ``loss.py``."""

    name: _Name = Field(description="what clients pass as loss_fn")
    description: str = Field("", max_length=500, description="what it is, for people who choose one")
    inputs: list[_Name] = Field(default_factory=list, description="loss_fn_inputs besides target_tokens")
    optional: list[_Name] = Field(default_factory=list, description="loss_fn_inputs that may be left out")
    settings: dict[_Name, float] = Field(
        default_factory=dict, description="keys of loss_fn_config with their defaults, each 0 or more"
    )


class WhitelistedLoss(LossTerms):
    """One that the operator allows, as `twinkle-serve losses` writes it down."""

    path: str = Field(min_length=1, description="local directory, or ms://owner/name on ModelScope")
    revision: str | None = Field(None, description="pinned revision; needed on ModelScope")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of its loss.json and loss.py")


class LossesConfig(Strict):
    custom_loss_server_side: bool = Field(
        True, description="SDK 0.38 and newer upload traced losses, which then run here, not in the client"
    )
    whitelist: list[WhitelistedLoss] = Field(
        default_factory=list, description="losses with code of their own, loaded when a rank starts"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> LossesConfig:
        names = [loss.name for loss in self.whitelist]
        if len(set(names)) != len(names):
            raise ValueError(f"whitelist: names must be unique, got {names}")
        return self

    def resolved(self, base: Path) -> LossesConfig:
        """The same with local paths made absolute, from the directory ``base``."""
        whitelist = []
        for loss in self.whitelist:
            local = os.path.normpath(base / Path(loss.path).expanduser())
            path = loss.path if "://" in loss.path else local
            whitelist.append(loss.model_copy(update={"path": path}))
        return self.model_copy(update={"whitelist": whitelist})
