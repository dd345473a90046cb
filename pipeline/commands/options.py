"""Which options do many commands have?"""

from typing import Annotated

import typer

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Where outputs lie: a folder or s3://bucket/prefix. (default: $GPT2_STORE or store/)"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
