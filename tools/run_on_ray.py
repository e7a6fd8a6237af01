"""Make the pictures of a long list with Ray: on this machine, or on the hosts of a cluster.

    python tools/run_on_ray.py prompts.jsonl --output_dir pictures
    python tools/run_on_ray.py s3://bucket/prompts --output_dir s3://bucket/pictures --address auto

Rows are those of a prompts file (docs/scale.md). The same command again makes what is missing.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":  # the other imports take a second
    stop_at_once_on_signals()

for needed in ("ray", "pyarrow", "fsspec"):  # which pictures of one machine do without
    if find_spec(needed) is None:
        print(f"error: {needed} is not installed: tools/set_up.sh ray installs it", file=sys.stderr)
        sys.exit(5)

if TYPE_CHECKING:
    from common.scale.ray_pools import Pool

import typer
from tqdm import tqdm
from typer.core import TyperCommand

from common.commands import flag
from common.compute.options import read_run_options
from common.compute.sharding import parse_mesh
from common.declared import LATENTS, PICTURES
from common.errors import BadSettingError, error_of
from common.files.recipe import to_json
from common.messages import say, warn
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.process import run_command
from common.runs.flags import Flag, add_flags
from common.runs.generation import check_size, read_run_settings, resolve
from common.runs.in_turn import flags_of_a_run, plan
from common.scale.makers import LIST_FILE, OF_ROWS, Making, hash_of, write_list
from common.scale.planning import Format
from common.scale.row_files import find_files
from common.scale.shards import Failure, Shard, about_file, plan_shards

SCALE = "Many hosts"
# Of a run that makes one list in one folder, by what is to be done in place of them.
REFUSED = {
    **dict.fromkeys(("prompt", "prompt_2", "prompts_file"), "name the list alone"),
    **dict.fromkeys(("image", "mask_image"), "name them in the list"),
    **dict.fromkeys(("prompt_syntax", "wildcards"), "write the combinations out"),
    **dict.fromkeys(("output_dir", "input_dir", "only", "keep_overrides", "wait"), ""),
    **dict.fromkeys(("name_template", "index", "grid_images", "save_trajectory"), ""),
    **dict.fromkeys(("init_latents", "remote_vae", "progress", "repeat", "warmup"), ""),
    **dict.fromkeys(("profile", "profile_dir", "profile_steps", "warmup_steps"), ""),
}
# A shard's embeddings go from process to process in one piece of at most 2 GB; SDXL's are 1.3 MB.
MOST_SHARD_IMAGES = 1000
FIRST_ROWS = 10  # of which one has to suit the settings


class Processes(NamedTuple):
    """How many of each pool; None: as suits the cluster."""

    encoders: int | None
    makers: int | None
    together: str | None  # hosts that compute together, as `ray_pools.hosts_of` takes them
    host_chips: str | None  # as `ray_pools.chips_of_hosts` takes them


OUT_OF_RECIPES = {"prompt", "prompt_2", "negative_prompt", "negative_prompt_2", *OF_ROWS}


def main(
    context: typer.Context,
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="File or folder: .jsonl, .csv, .parquet.")
    ],
    output_dir: Annotated[
        str, flag("output_dir", "DIR", SCALE, "Folder or URL for the shards.")
    ] = "stage_outputs/on_ray",
    format: Annotated[
        Format,
        flag("format", "NAME", SCALE, "folder, webdataset, parquet. [folder]"),
    ] = "folder",
    shard_images: Annotated[
        int, flag("shard_images", "N", SCALE, "Pictures of a shard. [128]", least=1)
    ] = 128,
    keep_latents: Annotated[
        bool, flag("keep_latents", " ", SCALE, "Beside a folder's pictures.")
    ] = False,
    address: Annotated[
        str | None, flag("address", "HOST", SCALE, "auto or a cluster's; else: here.")
    ] = None,
    encoders: Annotated[
        int | None, flag("encoders", "N", SCALE, "Processes of stage 1. [by nodes]", least=1)
    ] = None,
    makers: Annotated[
        int | None, flag("makers", "N", SCALE, "Of the others, at most. [hosts]", least=1)
    ] = None,
    together: Annotated[
        str | None, flag("together", "HOSTS", SCALE, "A number, or a slice (v6e:4x4). [1]")
    ] = None,
    host_chips: Annotated[
        str | None, flag("host_chips", "NAME:N", SCALE, "Of hosts to come: TPU:8. [as there]")
    ] = None,
    max_failures: Annotated[
        int | None, flag("max_failures", "N", SCALE, "Rows that may fail. [all]", least=0)
    ] = None,
) -> int:
    """Make the pictures of a long list, in shards, with Ray.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    own = {"prompts", "output_dir", "format", "shard_images", "keep_latents", "address"}
    own |= {"encoders", "makers", "together", "host_chips", "max_failures"}
    flags = {
        name: value
        for name, value in context.params.items()
        if name not in own and value not in (None, [], ())
    }
    _refuse_config(flags.get("config"))
    if shard_images > MOST_SHARD_IMAGES:
        raise BadSettingError(f"--shard_images {shard_images}: give at most {MOST_SHARD_IMAGES}")
    if "://" not in output_dir:  # from wherever a process works
        output_dir = str(Path(output_dir).expanduser().resolve())
    if keep_latents and format != "folder":
        raise BadSettingError(f"--keep_latents is for --format folder, not {format}")
    making = Making(flags=flags, target=output_dir, form=format, latents=keep_latents)
    making = replace(making, content=hash_of(making.content_here()))
    store = making.store()
    with store.lock():
        return _make_all(
            _planned(prompts, making, shard_images),
            making,
            Processes(encoders, makers, together, host_chips),
            address,
            max_failures,
        )


def _refuse_config(path: Path | None) -> None:
    """Raise `BadSettingError` for settings of a `--config` file that are no list's."""
    given = read_run_settings(path, {}).model_dump(exclude_unset=True) if path else {}
    mends = {**REFUSED, "seed_offset": "give it as a flag"}
    for name in given.keys() & mends.keys():
        mend = mends[name] or "leave it out"
        raise BadSettingError(f"--config {path}: {name} does not go with a list: {mend}")


def _make_all(
    shards: Sequence[Shard],
    making: Making,
    processes: Processes,
    address: str | None,
    max_failures: int | None,
) -> int:
    store, output_dir = making.store(), making.target
    done = store.done()
    todo = [shard for shard in shards if shard.name not in done]
    images = sum(shard.images for shard in shards)
    say(f"{len(shards)} shard(s) of {images} picture(s), of which {len(todo)} are to be made")
    failures = store.failures([shard.name for shard in shards if shard.name in done])
    refuse_failures(failures, max_failures)
    if todo:
        _make(todo, making, processes, address, failures, max_failures)
    pictures, failed = store.finish([shard.name for shard in shards])
    if failed:
        warn(f"{failed} row(s) failed: {output_dir}/failed.parquet says why")
    say(f"{pictures} picture(s): {output_dir}/index.parquet")
    return 0


def _planned(prompts: str, making: Making, images: int) -> list[Shard]:
    """The shards of a list.

    Raises:
        BadSettingError: flags that no stage takes, or wrong ones.
        BadInputFileError: the list or the checkpoint cannot be read.
    """
    settings = making.settings()
    plan(making.flags)
    parse_mesh(read_run_options(making.flags).mesh)
    whole = {
        "settings": settings.model_dump(mode="json", exclude=OUT_OF_RECIPES),
        "negative_prompt": [settings.negative_prompt, settings.negative_prompt_2],
        "dtype": making.flags.get("dtype"),
        "content": making.content,
        "form": [making.form, making.latents],
    }
    shards = []
    with tqdm(unit=" rows", desc="list", disable=None) as bar:
        for shard in plan_shards(
            find_files(prompts),
            settings,
            images=images,
            whole=to_json(whole),
            content_of=about_file,
        ):
            bar.update(shard.rows)
            shards.append(shard)
    if not shards:
        raise BadSettingError(f"{prompts} holds no row: write some")
    _refuse_what_suits_no_row(shards[0], making)
    return shards


def _refuse_what_suits_no_row(shard: Shard, making: Making) -> None:
    """Raise `BadSettingError` for settings with which none of the first rows can be made."""
    settings, error = making.settings(), None
    checkpoint = open_checkpoint(settings, [*loaded_for(LATENTS), *loaded_for(PICTURES)])
    factor, native = checkpoint.vae_scale_factor, checkpoint.native_size
    for line in [line for line in shard.lines(settings) if line.failure is None][:FIRST_ROWS]:
        try:
            with tempfile.TemporaryDirectory() as name:
                write_list(Path(name), [line])
                given = settings.model_copy(update={"prompts_file": Path(name) / LIST_FILE})
                check_size(resolve(given, native_size=native, size_factor=factor), factor)
            return
        except BadSettingError as found:
            error = error or found
    if error is not None:
        raise error


def _make(
    shards: Sequence[Shard],
    making: Making,
    processes: Processes,
    address: str | None,
    failures: list[Failure],
    most: int | None,
) -> None:
    # Not for a list of which all is done: it takes seconds.
    from common.scale import pool_processes, ray_pools

    ray_pools.join(address, debug=bool(making.flags.get("debug")))
    together = ray_pools.hosts_of(processes.together)
    pools = ray_pools.pools_for(
        processes.encoders, processes.makers, together, processes.host_chips
    )
    say(" and ".join(pool.said() for pool in pools))
    total, done, seconds = sum(shard.images for shard in shards), 0, Counter[str]()
    with tqdm(total=total, unit=" pictures", disable=None) as bar:
        for made in pool_processes.make_shards(shards, making, pools):
            done += made.shard.images
            bar.update(made.shard.images)
            seconds.update(made.seconds)
            bar.set_postfix_str(
                ", ".join(
                    f"{p.name} could {done * _count(p) / seconds[p.name]:.1f}/s{_each(p)}"
                    for p in pools
                    if seconds[p.name]
                )
            )
            failures += made.failures
            refuse_failures(failures, most)


def _count(pool: "Pool") -> int:
    return 1 if pool.grows else pool.processes


def _each(pool: "Pool") -> str:
    return " each" if pool.grows else ""


def refuse_failures(failures: Sequence[Failure], most: int | None) -> None:
    """Raise the first failure where there are more than may be, with its own exit code."""
    if most is None or len(failures) <= most:
        return
    first = min(failures)
    said = f"{len(failures)} row(s) failed, more than --max_failures {most}; the first: "
    raise error_of(first.exit_code, f"{said}{first.error}")


def _flags() -> list[Flag]:
    return [each for each in flags_of_a_run() if each.name not in REFUSED]


def make_command() -> TyperCommand:
    """One command with this program's own flags and those of a run."""
    return add_flags(main, _flags())


if __name__ == "__main__":
    run_command(make_command(), "python tools/run_on_ray.py")
