"""Weight files that their authors publish: given by a setting, or fetched once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.config import EvaluationConfig
from pipeline.errors import UserError


class PublishedWeights(NamedTuple):
    """A weight file of somebody else's."""

    setting: str
    """The key of `evaluation` that gives its path; while that is null the file is torch hub's, fetched on first use."""
    url: str
    what: str
    """What it holds, in words."""
    hash_prefix: str | None = None
    """The first digits of its SHA-256."""

    def path(self, config: EvaluationConfig) -> Path:
        """Where it is, or will be. Raises UserError when the setting names no file."""
        given: str | None = getattr(config, self.setting)
        if given is None:
            return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.url).name
        if not Path(given).is_file():
            raise UserError(f"evaluation.{self.setting} is {given}: no such file; give the path of one")
        return Path(given)

    def fetch(self, config: EvaluationConfig) -> None:
        """Downloads it, if it is missing. Raises UserError when it can't be."""
        path = self.path(config)
        if path.is_file():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.hash_prefix)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download {self.what} ({error}): put {self.url} at {path}, or set evaluation.{self.setting} to "
                "its path"
            ) from error
