"""The commands ``dinov3-ray extract``, ``dinov3-ray export`` and ``dinov3-ray show``.

What they compute with is imported when they run, so that the help, and a usage that is wrong, are answered at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinov3_ray.cli.teacher_options import computing_options, model_options
from dinov3_ray.cli.values import Colour, ImageSize, InputSize, Integers, Outputs, PillowPlugin, address_option
from dinov3_ray.config import open_config
from dinov3_ray.config.preprocessing import Size, ViewSize
from dinov3_ray.datasets.limits import MAX_PIXELS
from dinov3_ray.errors import InputError, StoreError
from dinov3_ray.feature_spec import RESULT_DTYPES, FeatureSpec
from dinov3_ray.pool.address import NAMESPACE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dinov3_ray.datasets import FeatureStore
    from dinov3_ray.datasets.extraction.plan import Forecast
    from dinov3_ray.features import Features
    from dinov3_ray.pool.client.remote import RemoteTeacher

__all__ = ["export_command", "extract_command", "show_command"]


@click.command("extract")
@click.argument("source")
@click.argument("out")
@model_options()
@click.option("--pool", help="The name of a running pool, instead of --root.")
@click.option("--namespace", default=NAMESPACE, show_default=True, help="The pool's Ray namespace.")
@click.option(
    "--outputs",
    default="cls,map",
    show_default=True,
    type=Outputs(),
    help="Any of cls, map, registers, separated by commas.",
)
@click.option("--layers", default="", type=Integers(), help="Blocks whose maps to store, such as 4,11.")
@click.option("--no-norm", is_flag=True, help="Store intermediate layers without the model's final LayerNorm.")
@click.option("--map-size", type=ImageSize(), help="Resample maps on the teacher to this size.")
@click.option(
    "--dtype", default="native", show_default=True, type=click.Choice(RESULT_DTYPES), help="The dtype to store."
)
@computing_options(dtype="--compute-dtype")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Images per forward pass; a resumed run may have another. [default: 32]",
)
@click.option(
    "--block-size", type=click.IntRange(1), help="Images per block, which is committed and resumed as a whole."
)
@click.option(
    "--replicas", type=click.IntRange(1), help="Teachers. [default: one per GPU, or one per node without any]"
)
@click.option("--num-gpus", type=float, help="GPUs to reserve per teacher, or a share of one.")
@click.option("--decoders", type=click.IntRange(1), help="Decoding tasks per block in flight.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads per teacher, if it computes on CPUs.")
@click.option("--image-column", help="The image column of a Parquet source.")
@click.option("--id-column", help="The id column of a Parquet source; '#row' takes row numbers.")
@click.option("--max-pixels", default=MAX_PIXELS, show_default=True, type=click.IntRange(1), help="Larger images fail.")
@click.option(
    "--background",
    default="255,255,255",
    show_default=True,
    type=Colour(),
    help="The colour behind transparent pixels.",
)
@click.option(
    "--shrink-to",
    type=click.IntRange(1),
    help="Decode larger images at 1/2, 1/4 or 1/8 of their size, leaving their shorter side at least this many pixels.",
)
@click.option(
    "--plugin",
    multiple=True,
    type=PillowPlugin(),
    expose_value=False,
    help="A Pillow plug-in for more formats, such as pillow_heif:register_heif_opener. May be repeated.",
)
@click.option(
    "--max-errors",
    type=click.FloatRange(0, 1),
    help="The largest share of images that may be errors. [default: any, but not all]",
)
@click.option("--source-moved", is_flag=True, help="Go on with a run whose same files now lie at SOURCE.")
@address_option
@click.option("--dry-run", is_flag=True, help="Show what would be written, and stop.")
@click.option("--force", is_flag=True, help="Start even if the result does not fit the disk.")
@click.option("--quiet", is_flag=True, help="Show no progress bar.")
def extract_command(
    source: str,
    out: str,
    root: str | None,
    revision: str | None,
    pool: str | None,
    namespace: str,
    outputs: dict[str, bool],
    layers: tuple[int, ...],
    no_norm: bool,
    map_size: Size | None,
    dtype: Any,
    computing: dict[str, Any],
    batch_size: int | None,
    block_size: int | None,
    image_column: str | None,
    id_column: str | None,
    max_pixels: int,
    background: tuple[int, int, int],
    shrink_to: int | None,
    max_errors: float | None,
    source_moved: bool,
    address: str | None,
    dry_run: bool,
    force: bool,
    quiet: bool,
    **resources: Any,
) -> None:
    """Extract the features of SOURCE into a store, OUT; the same command resumes it.

    SOURCE is a folder, file, glob (such as 'photos/**/*.{jpg,png}') or URI of images, WebDataset shards (.tar) or
    Parquet files with image bytes.
    """
    spec = FeatureSpec(**outputs, layers=layers, norm=not no_norm, map_size=map_size, dtype=dtype)
    if root is None and not set(computing.values()) <= {None, "auto"}:
        raise click.UsageError(
            "--image-size, --compute-dtype, --compile, --attention and --backend belong to --root: a pool has its own "
            "settings"
        )
    from dinov3_ray.datasets.extraction.extract import extract
    from dinov3_ray.datasets.extraction.plan import batches_text, size_text
    from dinov3_ray.datasets.extraction.resources import Resources
    from dinov3_ray.datasets.folder import ERRORS, Folder
    from dinov3_ray.datasets.sources.open import SourceOptions

    config = None
    if root is not None:
        config = open_config(root, revision=revision, **computing)
    options = SourceOptions(
        image_column=image_column,
        id_column=id_column,
        max_pixels=max_pixels,
        background=background,
        shrink_to=shrink_to,
    )
    try:
        done = extract(
            source,
            out,
            config,
            spec,
            pool=None if pool is None else _client(pool, namespace),
            batch_size=batch_size,
            block_size=block_size,
            max_errors=max_errors,
            source_moved=source_moved,
            options=options,
            resources=Resources(**resources),
            address=address,
            dry_run=dry_run,
            check_space=not force,
            progress=False if quiet else None,
            on_forecast=_announce,
        )
    except KeyboardInterrupt:
        click.echo(f"interrupted: finished blocks stay in {out}, and the same command continues from there", err=True)
        raise
    if done.manifest is not None:
        manifest = done.manifest
        click.echo(f"{out}: {manifest['rows']:,} rows, {size_text(manifest['bytes'])}, {manifest['errors']:,} errors")
        if len(manifest["batch_sizes"]) > 1:
            click.echo(f"  {batches_text({int(size): parts for size, parts in manifest['batch_sizes'].items()})}")
        for kind, count in manifest["errors_by_kind"].items():
            click.echo(f"  {kind}: {count:,}")
        if manifest["errors"]:
            click.echo(f"  see {Folder.at(out).join(ERRORS)}")


def _announce(forecast: Forecast) -> None:
    click.echo(str(forecast), err=True)


def _client(pool: str, namespace: str) -> RemoteTeacher:
    from dinov3_ray.pool.client.remote import RemoteTeacher  # which imports torch

    return RemoteTeacher(pool, namespace=namespace)


@click.command("export")
@click.argument("out")
@click.argument("dest", required=False)
@click.option("--to", required=True, type=click.Choice(["lance", "webdataset", "npy"]), help="The format to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "int8"]),
    help="The dtype to write; int8 with its scales. [default: the store's, but int8 in its result dtype]",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    help="Images per shard of webdataset, or fragment of Lance. [default: as many as take about 256 MB]",
)
@click.option("--force", is_flag=True, help="Start even if the result does not fit the disk.")
@click.option("--quiet", is_flag=True, help="Show no progress bar.")
def export_command(
    out: str, dest: str | None, to: Any, dtype: Any, shard_size: int | None, force: bool, quiet: bool
) -> None:
    """Copy the store OUT to DEST, in a format of other tools; the same command resumes it.

    DEST is a local folder, by default OUT with the format as its suffix. It gets this name when all is there; until
    then it is DEST.partial.
    """
    from dinov3_ray.datasets.exports.export import export
    from dinov3_ray.datasets.folder import ERRORS

    try:
        done = export(
            out,
            to,
            dest,
            dtype=dtype,
            shard_size=shard_size,
            progress=False if quiet else None,
            check_space=not force,
            on_forecast=_announce,
        )
    except KeyboardInterrupt:
        click.echo("interrupted: what is whole stays, and the same command continues from there", err=True)
        raise
    click.echo(f"{done.path}: {done.manifest['rows']:,} rows")
    if errors := done.manifest["store"]["errors"]:
        click.echo(f"  {errors:,} images could not be read, and have no row: see {done.path / ERRORS}")


@click.command("show")
@click.argument("out", required=False)
@click.argument("id_", metavar="[ID]", required=False)
@click.option("--images", help="Where the store's images lie now, if not where they were: a folder or a URI.")
@click.option("--image", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="An image file.")
@model_options("With --image: the teacher's model")
@click.option("--device", default="cpu", show_default=True, help="With --image: where to compute.")
@click.option(
    "--image-size",
    type=InputSize(),
    help="With --image: the model's input size; a larger one shows more detail, and input is the image's own.",
)
@click.option("--layer", type=int, help="Draw the map of this block, instead of the final map.")
@click.option("--to", type=click.Path(path_type=Path), help="The file to write. [default: named after the image]")
def show_command(
    out: str | None,
    id_: str | None,
    images: str | None,
    image: Path | None,
    root: str | None,
    revision: str | None,
    device: str,
    image_size: Size | ViewSize | None,
    layer: int | None,
    to: Path | None,
) -> None:
    """Draw a feature map: that of image ID in the store OUT, or that of --image FILE by the teacher in --root.

    Its first three principal components are red, green and blue. The image is next to it, if it is still there.
    """
    if (out is None or id_ is None) == (image is None or root is None) or (image is None) != (root is None):
        raise click.UsageError("give either OUT and ID, or --image FILE and --root DIR")
    from dinov3_ray.pictures import PcaBasis, save_grid

    pixels: np.ndarray | None
    if image is not None and root is not None:
        import torch

        from dinov3_ray.datasets.decode import Decoder
        from dinov3_ray.model import open_teacher

        pixels = Decoder().read(image.read_bytes(), str(image))
        teacher = open_teacher(root, device, revision=revision, image_size=image_size, compile=False)
        spec = FeatureSpec(feature_map=layer is None, layers=() if layer is None else (layer,), dtype="float32")
        features, name = teacher.extract(torch.from_numpy(pixels), spec), image.name
    else:
        assert out is not None
        assert id_ is not None
        from dinov3_ray.datasets import FeatureStore

        store = FeatureStore(out, partial=True)
        features, name, pixels = store[id_], id_, _original(store, id_, images)
    map_Dhw = _map(features, layer)
    picture = PcaBasis.fit(map_Dhw).rgb(map_Dhw)
    title = f"{'feature map' if layer is None else f'block {layer}'}, {map_Dhw.shape[1]} x {map_Dhw.shape[2]}"
    panels, titles = ([picture], [title])
    if pixels is not None:
        panels, titles = [pixels.transpose(1, 2, 0), picture], [name, title]
    path = save_grid([panels], to or Path(f"{Path(name).stem}-features.png"), titles)
    click.echo(str(path))


def _map(features: Features, layer: int | None) -> Tensor:
    found = features.feature_map if layer is None else features.layers.get(layer)
    if found is None:
        held = [name for name, tensor in features.named() if tensor.ndim == 4]
        raise StoreError(f"the store has no such map; it has: {', '.join(held) or 'none'} (see --layer)")
    return found[0].float()


def _original(store: FeatureStore, id_: str, images: str | None) -> np.ndarray | None:
    """The pixels of the image, uint8 [3,H,W]; None if it is no longer there."""
    from dinov3_ray.datasets.stored import Originals

    try:
        return Originals(store, images)(id_)
    except (StoreError, InputError) as error:
        click.echo(f"without the image: {error}", err=True)
        return None
