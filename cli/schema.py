"""``hhh-router schema``: the JSON schema of the metadata block."""

import typer


def schema() -> None:
    """Print the JSON schema of the metadata block that every reply carries under `hhh`."""
    import json

    from hhh_router.trace.block import metadata_schema

    typer.echo(json.dumps(metadata_schema(), indent=2))
