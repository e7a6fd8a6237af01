"""Plan a long list on TPU hosts: how many hosts or hours, what it costs, and what would hold it up.

    python tools/plan_scale.py --images 10000000 --topology v6e:2x4 --hours 24
    python tools/plan_scale.py --images 10000000 --topology v6e:2x4 --hosts 64 --simulate

Estimates: nothing of it was measured on a TPU. docs/scale.md has the formula and where each figure
comes from.
"""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.stopping import stop_at_once_on_signals

if __name__ == "__main__":
    stop_at_once_on_signals()


from common.commands import Debug, flag, make_command
from common.errors import BadSettingError, UnfitEnvironmentError
from common.messages import say
from common.process import run_command
from common.scale.planning import FURTHEST, Format, Hosts, Plan, Shared, Shares, Work, chips_of

LIST, HOSTS, MEASURED = "The list", "The hosts", "In place of what is assumed"
TIMES = (1, 10, 100, 1000)  # hosts that are simulated


def main(
    images: Annotated[int, flag("images", "N", LIST, "Pictures to make.", least=1)],
    topology: Annotated[
        str, flag("topology", "NAME", HOSTS, "Chips of a host. [v6e:2x4]")
    ] = "v6e:2x4",
    hosts: Annotated[int | None, flag("hosts", "N", HOSTS, "How many. [1]", least=1)] = None,
    hours: Annotated[
        float | None, flag("hours", "HOURS", HOSTS, "In place of --hosts: until it is done.")
    ] = None,
    preemptions: Annotated[
        float, flag("preemptions", "N", HOSTS, "A day, of each host (spot). [0]", least=0)
    ] = 0.0,
    restart: Annotated[
        float, flag("restart", "SECONDS", HOSTS, "Until a new host makes pictures. [300]", least=0)
    ] = Hosts.restart,
    cores: Annotated[
        int | None, flag("cores", "N", HOSTS, "Of a host. [its VM type's]", least=2)
    ] = None,
    text_cores: Annotated[
        int | None, flag("text_cores", "N", HOSTS, "Of these, for stage 1. [a third]", least=1)
    ] = None,
    num_inference_steps: Annotated[
        int, flag("num_inference_steps", "N", LIST, "Of a picture. [25]", least=1)
    ] = Work.steps,
    shard_images: Annotated[
        int, flag("shard_images", "N", LIST, "Pictures of a shard. [128]", least=1)
    ] = Work.shard_images,
    format: Annotated[
        Format, flag("format", "NAME", LIST, "folder, webdataset, parquet. [webdataset]")
    ] = Work.form,
    keep_latents: Annotated[
        bool, flag("keep_latents", " ", LIST, "Latents are kept as well.")
    ] = False,
    picture_mb: Annotated[
        float | None, flag("picture_mb", "MB", MEASURED, "A picture's file. [1.14]")
    ] = None,
    unet_json: Annotated[
        Path | None, flag("unet_json", "FILE", MEASURED, "Of stage 2's --topology --json.")
    ] = None,
    vae_json: Annotated[
        Path | None, flag("vae_json", "FILE", MEASURED, "Of stage 3's --topology --json.")
    ] = None,
    target_gb_per_second: Annotated[
        float, flag("target_gb_per_second", "GB", MEASURED, "That the target takes. [25]")
    ] = Shared.bytes_per_second / 1e9,
    target_files_per_second: Annotated[
        float, flag("target_files_per_second", "N", MEASURED, "That it takes. [1000]")
    ] = Shared.objects_per_second,
    simulate: Annotated[
        bool, flag("simulate", " ", HOSTS, "1, 10, 100 and 1000 hosts, shard by shard.")
    ] = False,
    debug: Debug = False,
) -> int:
    """Plan a long list on TPU hosts, from estimates.

    Defaults stand in brackets; hyphens in flags work as well.
    """
    if hosts is not None and hours is not None:
        raise BadSettingError("--hosts and --hours: give one of them")
    if hours is not None and hours <= 0:
        raise BadSettingError(f"--hours {hours:g}: give more than 0")
    chips = chips_of(topology, unet_json, vae_json, num_inference_steps)
    cores = cores or chips.cores
    text_cores = text_cores or cores // 3 or 1
    if text_cores >= cores:
        raise BadSettingError(f"--text_cores {text_cores}: give fewer than the {cores} of a host")
    if keep_latents and format != "folder":
        raise BadSettingError(f"--keep_latents is for --format folder, not {format}")
    if min(target_gb_per_second, target_files_per_second) <= 0:
        raise BadSettingError("--target_gb_per_second and --target_files_per_second: give more")
    shares = Shares()
    if picture_mb is not None:
        shares = replace(shares, picture_bytes=int(picture_mb * 1e6))
    plan = Plan(
        work=Work(
            images=images,
            form=format,
            steps=num_inference_steps,
            shard_images=shard_images,
            latents=keep_latents,
        ),
        hosts=Hosts(
            topology=topology,
            chips=chips,
            cores=cores,
            cores_of_text=text_cores,
            preemptions=preemptions,
            restart=restart,
        ),
        shares=shares,
        count=hosts or 1,
    )
    shared = Shared(
        bytes_per_second=target_gb_per_second * 1e9,
        objects_per_second=target_files_per_second,
    )
    plan.check()
    if hours is not None:
        plan = plan.within(hours)
    say("\n".join([*lines_of(plan), *limits_of(plan, shared)]))
    if simulate:
        say("\n".join(lines_of_simulation(plan, shared)))
    return 0


def lines_of(plan: Plan) -> list[str]:
    """A plan in words."""
    chips, work = plan.hosts.chips, plan.work
    by = "text encoders" if plan.rate_of_text < plan.rate_of_chips else "chips"
    lost = f", {plan.lost:.1%} of it lost to preemptions" if plan.lost else ""
    return [
        f"{work.images} images of SDXL, 1024×1024, {work.steps} steps, on {plan.count} host(s) of "
        f"{plan.hosts.topology}: estimates (docs/scale.md has the formula)",
        f"  a host       {plan.rate:.2f} images/s, bound by its {by} (chips "
        f"{plan.rate_of_chips:.2f}, text encoders {plan.rate_of_text:.2f}){lost}",
        f"  a shard      {work.shard_images} pictures in {plan.shard_seconds:.1f} s",
        f"  hours        {plan.hours:.1f}, and {plan.list_minutes:.0f} min before to read the list",
        f"  chip-hours   {plan.chip_hours:.0f} ({plan.count} × {chips.chips} chips)",
        f"  storage      {plan.storage_bytes / 1e12:.2f} TB",
    ]


def limits_of(plan: Plan, shared: Shared) -> list[str]:
    """What all hosts share, and how many it has room for."""
    most = plan.most_hosts(shared)
    first = min(most, key=lambda name: most[name])
    lines = [
        f"  room for     {', '.join(f'{count} hosts ({name})' for name, count in most.items())}",
    ]
    if plan.count > most[first]:
        lines.append(
            f"  too much     for {first}, which would be over {FURTHEST:.0%} busy: give larger "
            "shards, another --format, or a target that takes more"
        )
    return lines


def lines_of_simulation(plan: Plan, shared: Shared) -> list[str]:
    """A table of some numbers of hosts.

    Raises:
        UnfitEnvironmentError: what simulates is not installed.
    """
    if find_spec("simpy") is None or find_spec("ray") is None:
        raise UnfitEnvironmentError("--simulate: simpy is not installed: tools/set_up.sh ray")
    from common.scale.simulation import simulate

    lines = [
        "",
        "| hosts | images/s | of as many single ones | program | target's bytes | its files "
        "| Ray's object store | saturated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count in TIMES:
        found = simulate(replace(plan, count=count), shared)
        busy = " | ".join(f"{part:.1%}" for part in found.busy.values())
        lines.append(
            f"| {count} | {found.images_per_second:.1f} | {found.of_linear:.1%} | {busy} "
            f"| {found.object_store:.1%} | {found.saturated or 'nothing'} |"
        )
    return lines


if __name__ == "__main__":
    run_command(make_command(main))
