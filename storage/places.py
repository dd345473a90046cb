"""Where do a user's outputs and this machine's own files lie?

The store holds data and records, in a folder or on S3. The home is always local: Dagster's instance, the
lineage index, downloads in progress and local copies of what lies on S3.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from storage import objects

STORE_VARIABLE = "GPT2_STORE"
HOME_VARIABLE = "GPT2_HOME"


@dataclass(frozen=True)
class Places:
    store: str  # absolute path or s3:// URL
    home: Path  # absolute

    @property
    def dagster_home(self) -> Path:
        return self.home / "dagster"

    @property
    def lineage(self) -> Path:
        return self.home / "lineage.duckdb"

    def local_folder(self, output_folder: str) -> str:
        """The local folder that stands for `output_folder` of the store: itself, or its copy in the home."""
        if objects.is_local(self.store):
            return output_folder
        return str(self.home / "staged" / output_folder.split("://", 1)[1])

    def variables(self) -> dict[str, str]:
        """The environment that makes Dagster's own commands see the same instance and outputs."""
        return {
            STORE_VARIABLE: self.store,
            HOME_VARIABLE: str(self.home),
            "DAGSTER_HOME": str(self.dagster_home),
        }


def places(store: str | None = None, environment: Mapping[str, str] = os.environ) -> Places:
    """`store` if given, else GPT2_STORE, else `store/` here.

    The home is GPT2_HOME, else the store's own folder where that is local, else `.gpt2/` here. Raises ValueError
    for a store that is no address, and for a home that is not local.
    """
    url = store or environment.get(STORE_VARIABLE) or "store"
    if objects.is_local(url):
        url = objects.absolute(url)
        default_home = url
    else:
        url = url.rstrip("/")
        default_home = ".gpt2"
    home = environment.get(HOME_VARIABLE) or default_home
    if not objects.is_local(home):
        raise ValueError(f"{HOME_VARIABLE}={home} is not local: name a folder of this machine")
    return Places(url, Path(objects.absolute(home)))
