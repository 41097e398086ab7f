"""``hhh-router bundle``: list, check and describe bundles."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="List, check and describe bundles.")


@app.command("list")
def list_(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the bundles found here: under ./adapters and beside the package."""
    import json

    from hhh_router.bundle import Bundle, list_bundles, search_path
    from hhh_router.errors import BundleError

    rows = []
    for root in list_bundles():
        try:
            manifest = Bundle.load(root).manifest
        except BundleError as error:
            rows.append({"name": root.name, "path": str(root), "problem": error.message.splitlines()[0]})
            continue
        rows.append(
            {
                "name": manifest.name,
                "version": manifest.version,
                "path": str(root),
                "backbone": manifest.backbone.source,
                "licence": manifest.licence,
                "commercial_use": manifest.commercial_use,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"no bundle in {', '.join(map(str, search_path()))}", err=True)
    for row in rows:
        detail = row.get("problem") or f"{row['licence']}{'' if row['commercial_use'] else ', research only'}"
        typer.echo(f"{row['name']}  {row.get('version', '?')}  {row['path']}  ({detail})")


@app.command()
def verify(
    bundle: str = typer.Argument(..., metavar="PATH|NAME", help="A bundle's folder, or its name under adapters/."),
    release: bool = typer.Option(False, "--release", help="Also ask for measured figures within the evasion budget."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check hashes, weights, shapes and calibrators; every mistake is listed."""
    import json

    from hhh_router.bundle import Bundle
    from hhh_router.errors import EXIT_USAGE, MissingExtra
    from hhh_router.model.inspect import bundle_mistakes

    loaded = Bundle.load(bundle)
    mistakes = bundle_mistakes(loaded)
    if release:
        try:
            from hhh_router.evaluation.release import release_mistakes
        except ImportError as error:
            raise MissingExtra("train", needed_for="checking a bundle's figures") from error
        mistakes += release_mistakes(loaded)
    if as_json:
        found = {"name": loaded.manifest.name, "path": str(loaded.root), "sha256": loaded.sha256, "mistakes": mistakes}
        typer.echo(json.dumps(found, indent=2))
    elif mistakes:
        typer.echo("\n".join(mistakes), err=True)
        typer.echo(f"{loaded.root}: {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}", err=True)
    else:
        typer.echo(f"{loaded.manifest.name} {loaded.manifest.version}: all is as it should be ({loaded.sha256[:16]})")
    if mistakes:
        raise typer.Exit(EXIT_USAGE)


@app.command()
def card(
    bundle: str = typer.Argument(..., metavar="PATH|NAME", help="A bundle's folder, or its name under adapters/."),
    as_json: bool = typer.Option(False, "--json", help="Print the manifest and the card as JSON."),
) -> None:
    """Show a bundle's card: what it was trained on, and its measured figures."""
    import json

    from hhh_router.bundle import Bundle
    from hhh_router.errors import BundleError

    loaded = Bundle.load(bundle)
    path = loaded.root / "CARD.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{path}: cannot be read ({error})", hint="the card is written by training; restore it"
        ) from error
    if as_json:
        manifest = loaded.manifest.model_dump(mode="json")
        typer.echo(json.dumps({"manifest": manifest, "sha256": loaded.sha256, "card": text}, indent=2))
        return
    typer.echo(text)
