"""Compile for a TPU that is not there, with the compiler in the `libtpu` wheel."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.compute import tpu_estimate
from common.compute.sharding import name_of
from common.compute.tpu_estimate import CHIPS, Chip
from common.errors import (
    OUT_OF_DEVICE_MEMORY,
    BadSettingError,
    UnfitEnvironmentError,
    in_one_line,
)
from common.models.checkpoint import Checkpoint, open_checkpoint
from common.models.weights import quiet_libraries
from common.runs import flags
from common.runs.generation import (
    GenerationConfig,
    ModelSettings,
    RunOptions,
    check_size,
    read_generation_config,
    read_run_options,
    read_run_settings,
    resolve,
)
from common.whole_files import write_text_whole

if TYPE_CHECKING:
    from common.compute.devices import Devices

FORM = re.compile(r"(\w+):(\d+x\d+(?:x\d+)?)")
COMPILED_BY = ("backend", "mesh", "batch_size", "steps_per_call", "operations")  # options


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v6e:2x4.

    Raises:
        BadSettingError: not of that form, or a chip whose figures are not known.
    """
    match = FORM.fullmatch(topology)
    if match is None or match[1] not in CHIPS:
        raise BadSettingError(
            f"--topology {topology} is not understood: give a chip and its grid, such as v6e:2x4 "
            f"(chips: {', '.join(CHIPS)})"
        )
    return CHIPS[match[1]]


def prepare_environment() -> None:
    """Keep jax from looking for a chip; call before jax is imported."""
    if find_spec("libtpu") is None:
        raise UnfitEnvironmentError(
            "--topology needs the TPU compiler: pip install 'jax[tpu]', or tools/set_up.sh tpu"
        )
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Another process may compile at the same time; nothing here touches a chip.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # Without these the library complains of a machine that is none of a TPU's.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology, to make a mesh of.

    Raises:
        BadSettingError: the compiler knows no such grid.
    """
    from jax.experimental import topologies

    grid = topology.split(":")[1]
    single = {"chips_per_host_bounds": (1, 1, 1)} if set(grid) <= {"1", "x"} else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **single)
    except Exception as error:
        raise BadSettingError(
            f"--topology {topology}: the TPU compiler refuses it ({in_one_line(error)}): choose "
            "another grid"
        ) from None
    return list(description.devices)


def prepare(
    topology: str,
    parameters: Mapping[str, Any],
    source_dir: Path | None,
    stage_dtype: str,
    components: Sequence[str],
) -> "tuple[Chip, GenerationConfig, Checkpoint, RunOptions, Devices]":
    """What a stage compiles for a TPU that is not there: its chip, settings, configs and devices.

    Settings are the built-in ones and the flags, or those of the run in `source_dir`; of the
    checkpoint only configs are read. Imports jax and torchax.
    """
    chip = chip_of(topology)
    options = read_run_options(parameters)
    refuse_flags_of_a_run(options, parameters)
    prepare_environment()
    config, checkpoint = read_settings(source_dir, parameters, stage_dtype, components)
    quiet_libraries()
    from common.compute.devices import Devices

    devices = Devices.described(devices_of(topology), int(chip.memory_bytes))
    return chip, config, checkpoint, options, devices


def refuse_flags_of_a_run(options: RunOptions, parameters: Mapping[str, Any]) -> None:
    """Raise `BadSettingError` for flags that would change nothing in what is compiled."""
    if options.backend == "torch":
        raise BadSettingError("--topology compiles by jax: leave it or --backend torch out")
    asked = [name for name in options.given() if name not in COMPILED_BY]
    asked += [name for name in ("wait", "skip_fresh") if parameters.get(name)]
    if asked:
        # The last: --profile_dir asks for --profile as well.
        raise BadSettingError(
            f"--{asked[-1]} is for a run, and --topology only compiles: leave one of them out"
        )


def read_settings(
    source_dir: Path | None,
    parameters: Mapping[str, Any],
    stage_dtype: str,
    components: Sequence[str],
) -> tuple[GenerationConfig, Checkpoint]:
    """The settings to compile for: those of a run, or the built-in ones, with the flags."""
    if source_dir is not None:
        config = read_generation_config(source_dir)
        config, _ = flags.apply_overrides(config, parameters, stage_dtype)
        checkpoint = _open_configs(config, components)
        check_size(config, checkpoint.vae_scale_factor)
        return config, checkpoint
    settings = read_run_settings(None, flags.given_settings(parameters, stage_dtype))
    checkpoint = _open_configs(settings, components)
    config = resolve(
        settings, native_size=checkpoint.native_size, size_factor=checkpoint.vae_scale_factor
    )
    return config, checkpoint


def _open_configs(settings: ModelSettings, components: Sequence[str]) -> Checkpoint:
    """A checkpoint of which no weights are needed."""
    checkpoint = open_checkpoint(settings, ())
    checkpoint.check_supported(components)
    return checkpoint


def pictures_shape(text: str | None, config: GenerationConfig, factor: int) -> tuple[int, int, int]:
    """Number, height and width of the pictures to decode, as `N,H,W` or else by the settings.

    Args:
        factor: what height and width must be multiples of.

    Raises:
        BadSettingError: not of that form, or no such multiples.
    """
    if text is None:
        return len(config.image_seeds()), config.height, config.width
    match = re.fullmatch(r"([1-9]\d{0,5}),([1-9]\d{0,5}),([1-9]\d{0,5})", text)
    if match is None:
        raise BadSettingError(f"--pictures_shape {text} is not understood: give N,HEIGHT,WIDTH")
    count, height, width = map(int, match.groups())
    if height % factor or width % factor:
        raise BadSettingError(
            f"--pictures_shape {text}: give height and width as multiples of {factor}, which the "
            f"checkpoint {config.model_id} needs"
        )
    return count, height, width


def compile_and_say(
    lower: Callable[[], Any],
    chip: Chip,
    mesh: Any,
    *,
    title: str,
    images: int,
    steps: int,
    topology: str,
    hlo_file: Path | None,
    json_file: Path | None,
) -> None:
    """Compile a program and print what it would need and cost.

    Args:
        lower: traces the program.
        images: that one call works on.
        steps: of the program's loop, to make them; 0 without a loop.
        hlo_file: to write the compiled program to.
        json_file: to write all figures to.
    """
    began = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:
        if OUT_OF_DEVICE_MEMORY not in str(error):
            raise
        raise UnfitEnvironmentError(
            f"{title} does not fit into the {chip.memory_bytes / 1e9:.0f} GB of a {chip.name} "
            f"({in_one_line(error)}): ask for fewer pictures at once, or more chips"
        ) from None
    compile_seconds = time.perf_counter() - traced
    text = compiled.as_text()
    if hlo_file is not None:
        write_text_whole(hlo_file, text)
    once, step = tpu_estimate.estimate(text, chip)
    seconds = once.total_seconds + steps * step.total_seconds
    memory = tpu_estimate.memory_of(compiled)
    content = {
        "title": title,
        "topology": topology,
        "chips": mesh.size,
        "mesh": name_of(mesh),
        "images": images,
        "steps": steps,
        "trace_seconds": traced - began,
        "compile_seconds": compile_seconds,
        "memory_bytes": memory,
        "chip_memory_bytes": chip.memory_bytes,
        "fits": memory["total"] <= chip.memory_bytes,
        "once": once.as_json(),
        "step": step.as_json(),
        "images_per_second": images / seconds,
    }
    if json_file is not None:
        write_text_whole(json_file, json.dumps(content, indent=2, sort_keys=True) + "\n")
    flags.say(in_words(content))


def in_words(content: Mapping[str, Any]) -> str:
    """An estimate as the table that is printed."""
    memory = content["memory_bytes"]
    lines = [
        f"{content['title']}: an estimate without a TPU (docs/tpu.md has the method)",
        f"  topology   {content['topology']}, {content['chips']} chip(s), mesh {content['mesh']}, "
        f"{content['images']} image(s)",
        f"  memory     {memory['total'] / 1e9:.2f} of {content['chip_memory_bytes'] / 1e9:.0f} GB "
        f"a chip (weights and inputs {memory['arguments'] / 1e9:.2f}, temporaries "
        f"{memory['temporaries'] / 1e9:.2f}){'' if content['fits'] else ': DOES NOT FIT'}",
    ]
    if content["steps"]:
        lines += _part_in_words("one step", content["step"])
        once = content["once"]
        lines.append(
            f"  before     {1e3 * once['total_seconds']:.2f} ms once, {once['cycles'] / 1e6:.1f} M "
            "cycles"
        )
    else:
        lines += _part_in_words("all", content["once"])
    count = f" with {content['steps']} steps" if content["steps"] else ""
    lines += [
        f"  speed      {content['images_per_second']:.2f} images/s{count}",
        f"  compiled   in {content['compile_seconds']:.0f} s, traced in "
        f"{content['trace_seconds']:.0f} s",
    ]
    return "\n".join(lines)


def _part_in_words(name: str, estimate: Mapping[str, Any]) -> list[str]:
    total = estimate["total_seconds"]
    lines = [
        f"  {name:10} {1e3 * total:.2f} ms; {estimate['cycles'] / 1e6:.1f} M cycles in "
        f"{estimate['operations']} operations, kernels among them "
        f"{estimate['kernel_cycles'] / 1e6:.1f} M"
    ]
    moved = ", ".join(
        f"{count} {kind} ({estimate['collective_bytes'][kind] / 1e6:.1f} MB)"
        for kind, count in sorted(estimate["collectives"].items())
    )
    for part, seconds in estimate["seconds"].items():
        share = seconds / total if total else 0.0
        more = f"  {moved}" if part == "collectives" and moved else ""
        lines.append(f"    {part:12} {1e3 * seconds:7.2f} ms {share:6.1%}{more}")
    return lines
