"""The frame in which every stage runs: settings, lock, freshness, backend, progress, report.

A stage's script tells what it computes; what the scripts share is here, once. `run_script` is one
run in a process of its own, `ResidentStage` the same story for many runs in one process.
"""

import os
import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NoReturn, Self

from common.compute.backends import Backend, refuse_unknown_options, start_backend
from common.compute.clock import StageReport
from common.compute.kept import Kept
from common.compute.own_chips import take_chips
from common.compute.sharding import parse_mesh
from common.errors import BadSettingError
from common.files import artifacts, row_reader
from common.files.artifacts import Artifact
from common.files.kept_progress import Progress, remove_progress
from common.files.recipe import Recipe
from common.files.report import Profile
from common.files.rows import Rows, find_rows
from common.files.run_lock import RunLock
from common.files.stage_table import DENOISE, FIRST, LAST, Stage
from common.messages import say, warn
from common.models.checkpoint import Checkpoint
from common.models.component_table import loaded_for
from common.models.find import open_checkpoint
from common.models.hub import OFFLINE
from common.models.library_imports import quiet_libraries, spare_imports
from common.models.model_settings import PROJECT_DIR
from common.process import run_command
from common.progress import show_progress_as
from common.runs.chosen import parse_images
from common.runs.flags import OF_SERVING, Given, command_of
from common.runs.generation import (
    GenerationConfig,
    read_generation_config,
    read_run_settings,
    resolve,
    write_generation_config,
)
from common.runs.overrides import Overrides, overrides_of, values_of
from common.runs.parts import check_sizes, parts_of, warn_of_own_settings
from common.runs.picture_names import refuse_bad_names
from common.runs.seeds import MOVED, warn_of_seeds
from common.runs.words import say_times, say_why
from common.sampling.sampling_settings import merge_settings
from common.stopping import StopRequest, finishing_first

if TYPE_CHECKING:
    from common.sampling.together import Seat

DEVICE_FACTS = ("backend", "mesh", "platform", "device", "devices")


class StageRun:
    """One run of one stage."""

    def __init__(
        self,
        stage: Stage,
        given: Given,
        kept: Kept,
        stop: StopRequest | None = None,
        seat: "Seat | None" = None,
    ) -> None:
        """
        Args:
            seat: among runs that this process does at once.
            kept: by the process from one run to the next.
            stop: of a process that does many runs and hears signals itself; None for a process
                that does this run alone.
        """
        self.stage, self.given, self.kept, self._stop = stage, given, kept, stop
        self.seat = seat
        self.is_alone = stop is None
        self.report = StageReport(stage.number, since_process_began=self.is_alone)
        self.run_dir, self.source_dir = given.run_dir, given.source_dir
        self.overrides: Overrides = {}  # of the run's settings by flags
        self._dropped: Overrides = {}  # by which was made what is to be replaced
        self.progress: Progress | None = None
        self._stale: str | None = None

    def __enter__(self) -> Self:
        self.report.phase("settings")
        show_progress_as(self.given.flags.progress)
        self.options = self.given.options
        self.lock = RunLock.of_stage(
            self.run_dir,
            wait=self.given.flags.wait,
            writes=self.options.writes(),
            of_pictures=self.stage is LAST,
            beside=self.given.flags.stream,
        )
        if self.given.flags.offline:
            os.environ[OFFLINE] = "1"  # read by the hub's library when it is imported
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    # --- 1. settings ---

    def settle_settings(self) -> tuple[GenerationConfig, Checkpoint]:
        """Decide every setting of the run: defaults < config file < flags."""
        settings = read_run_settings(self.given.flags.config, self.given.settings())
        checkpoint = open_checkpoint(settings, loaded_for(self.stage.makes))
        config = resolve(
            settings,
            native_size=checkpoint.native_size,
            size_factor=checkpoint.vae_scale_factor,
        )
        warn_of_seeds(config.prompts, self.given.settings())
        warn_of_own_settings(config, self.given.settings())
        check_sizes(config, parts_of(config), checkpoint.vae_scale_factor)
        refuse_bad_names(config, self.run_dir)
        return config, checkpoint

    def read_settings(self) -> tuple[GenerationConfig, Checkpoint]:
        """The run's settings, and what the flags override for this run of this stage."""
        self.given.refuse_topology_flags()
        parse_mesh(self.options.mesh)
        refuse_unknown_options(self.options)
        self.lock.acquire(make_folder=False)
        config = read_generation_config(self.source_dir)
        given, made = self.given.settings(), overrides_of(self.run_dir, self.stage)
        if self.given.flags.keep_overrides:
            given = merge_settings(values_of(made), given, "flags")
        config, self.overrides = config.override(given)
        now = config.model_dump(mode="json")
        self._dropped = {name: pair for name, pair in made.items() if now.get(name) != pair[1]}
        warn_of_seeds(config.prompts, self.given.settings())
        warn_of_own_settings(config, self.given.settings())
        return config, open_checkpoint(config, loaded_for(self.stage.makes))

    # --- 2. input and freshness ---

    def inspect_input(self) -> Artifact:
        """The file of the stage before, whole, not yet loaded."""
        assert self.stage.reads is not None
        return artifacts.inspect(self.source_dir / self.stage.reads, verify=self.options.verify)

    def is_fresh(self, stale: str | None, path: Path) -> bool:
        """Whether nothing is to be done, which is said; the lock is taken where there is.

        Args:
            stale: why the output must be made anew, if it must.
            path: of the output.
        """
        if stale is None and self.given.flags.only is not None:
            stale = "--only asks for it"
        if self.given.flags.skip_fresh and stale is None:
            say(f"{self.stage.name}: fresh ({path})")
            return True
        self._stale = stale if self.given.flags.skip_fresh else None
        self.lock.acquire()
        self.lock.refuse_unwritable()
        return False

    def begin(self, doing: str) -> None:
        """Say what is done, and why."""
        say(f"{self.stage.name}: {doing}")
        say_why(self._stale, self.overrides, self._dropped)

    @property
    def takes_rows(self) -> bool:
        """Whether rows are taken that are there: not where all are to be made, or measured.

        Nor by several processes, which may see other folders.
        """
        measured = self.options.why_measure() is not None
        several = self.options.distributed is not None
        by_rows = self.given.flags.skip_fresh or self.given.flags.only is not None
        return by_rows and not measured and not several

    def asked_for(self, images: int) -> set[int]:
        """The images that `--only` names, among so many of the run."""
        only = self.given.flags.only
        return set() if only is None else {*parse_images(only, images, "--only")}

    def find_rows(self, path: Path, recipes: Sequence[Recipe], config: GenerationConfig) -> Rows:
        """The rows to write to a file; those that it has already are taken, which is said.

        Where `takes_rows` says no, or a trajectory is saved, all are made.
        """
        asked = self.asked_for(len(config.image_seeds()))
        if self.stage is FIRST:
            prompt_of = config.prompt_of_images()
            asked = {prompt_of[image] for image in asked}
        if not self.takes_rows or self.options.save_trajectory:
            if self.given.flags.only is not None:
                warn("--only has no effect where a run is measured, distributed or a trajectory")
            return Rows.all_missing(recipes)
        rows = find_rows(path, recipes, verify=self.options.verify)
        if rows.earlier is not None and len(recipes) > 1:
            changes = rows.changes(len(asked & rows.places.keys()))
            say(f"  {changes.in_words()}")
            if "seed" in changes.names and config.seeds_count_places:
                say(f"  {MOVED}")
        return rows.without(asked)

    # --- 3. backend ---

    def import_libraries(self, *spared: str) -> None:
        """Get ready to import diffusers and transformers.

        Args:
            spared: packages that they need not import, in a process that does this run alone.
        """
        self.report.phase("imports")
        if not self.given.flags.debug:
            quiet_libraries()
        if spared and self.is_alone:
            spare_imports(*spared)

    def start_backend(self, *, torch_on_cpus: bool) -> Backend:
        """Start the backend that is asked for, as `backends.start_backend` decides it."""
        self.import_libraries()
        return start_backend(self.options, torch_on_cpus=torch_on_cpus)

    # --- 4. computing ---

    def keep_progress(
        self,
        recipe: Recipe,
        devices: dict[str, Any],
        rows: Rows | None = None,
        **facts: Any,
    ) -> None:
        """Keep what is done, so that a stopped run goes on from there.

        Nothing is kept where the run is measured, or one of several.

        Args:
            recipe: of what the stage makes.
            devices: what the report says of them.
            rows: where progress is kept by rows, so that a run goes on which has some of them.
            facts: what else must be the same for a run to go on from another's progress.
        """
        import torch

        if self.options.distributed is not None or self.options.why_measure() is not None:
            return
        self.progress = Progress(
            self.run_dir,
            self.stage.number,
            {
                "fingerprint": recipe.fingerprint() if rows is None else None,
                "batch_size": self.options.batch_size,
                "operations": self.options.operations,
                "save_trajectory": self.options.save_trajectory,
                **{name: devices.get(name) for name in DEVICE_FACTS},
                # Sums are split over a CPU's threads.
                "threads": torch.get_num_threads() if devices["platform"] == "cpu" else None,
                **facts,
            },
            recipe,
        )
        if why := self.progress.why_unused(() if rows is None else rows.fingerprints):
            say(f"  what an earlier run kept is not used: {why}")

    @contextmanager
    def finishing_first(self, *, keeps: bool) -> Iterator[StopRequest | None]:
        """Within the block a signal to stop waits for what runs, if that is kept."""
        if not keeps:
            yield None
            return
        with finishing_first() if self._stop is None else nullcontext(self._stop) as stop:
            yield stop

    def load_input(self, artifact: Artifact) -> dict[str, Any]:
        """An inspected file's tensors."""
        return row_reader.load_tensors(artifact, warn)

    @property
    def profile_folder(self) -> Path:
        """Where a trace is written."""
        return self.options.profile_folder(self.run_dir, self.stage.number)

    def refuse_steps_to_profile(self, evaluations: int) -> None:
        """Raise `BadSettingError` where steps are to be profiled that the run does not have."""
        if self.options.profile:
            self.options.profiled_steps(evaluations)

    # --- 5. writing ---

    def settings_written(self, config: GenerationConfig) -> None:
        """Let the settings stand beside what was made by them; what was kept has served."""
        if self.stage is FIRST or self.run_dir.resolve() != self.source_dir.resolve():
            write_generation_config(self.run_dir, config)
        remove_progress(self.run_dir, self.stage.number)

    def finish(self, path: Path, *, profile: Profile | None = None, **facts: Any) -> None:
        """Write the report, and say where the time went.

        Args:
            path: of what was written.
            facts: fields of `Report` that the clock does not collect.
        """
        self.report.write(self.run_dir, profile=profile, overrides=self.overrides, **facts)
        say_times(self.report, path, profile)


Story = Callable[[StageRun], None]


def run_script(stage: Stage, story: Story) -> NoReturn:
    """Run a stage's script, as a process of its own."""

    def run(given: Given) -> int | None:
        if given.flags.serve is not None:
            if given.flags.chips is not None:  # before torch and jax are imported, and count cores
                take_chips(given.flags.chips, given.options.backend)
            code: int = resolve_name("common.serving.worker:serve")(given)
            return code
        for name in OF_SERVING:
            if name in given.parameters:
                raise BadSettingError(
                    f"--{name} is for --serve: give that as well, or leave it out"
                )
        with StageRun(stage, given, Kept(most_models=1)) as stage_run:
            _tell(story, stage_run)
        return None

    run_command(command_of(stage, run, story.__doc__ or ""))


def _tell(story: Story, run: StageRun) -> None:
    """Do a run; with `--topology` compile for a TPU that is not there, and run nothing."""
    if run.given.flags.topology is None or run.stage.estimate is None:
        story(run)
    else:
        resolve_name(run.stage.estimate)(run.given)


class ResidentStage:
    """A stage that stays: its models and programs serve many runs, whatever each asks for.

    A run gives the bits that a process of its own gives. Scripts do not need this.
    """

    def __init__(self, stage: Stage, kept: Kept | None = None) -> None:
        """`kept` may be shared by stages of one process."""
        self.stage, self.kept = stage, kept or Kept()
        self.stop = StopRequest()  # set its number to stop what runs when it is kept
        self.seat: Seat | None = None  # of the run that is to come, among others
        story = runpy.run_path(str(PROJECT_DIR / "stages" / stage.script))["main"]

        def run(given: Given) -> None:
            with StageRun(stage, given, self.kept, self.stop, self.seat) as stage_run:
                _tell(story, stage_run)

        self.command = command_of(stage, run, story.__doc__ or "")

    def open(self, *arguments: str) -> None:
        """Get ready for runs: import the libraries, start the backend that the flags ask for."""
        quiet_libraries()
        for module in ("torch", "diffusers", *(["transformers"] if self.stage is FIRST else [])):
            import_module(module)
        if self.stage is FIRST:
            return
        with self.command.make_context(self.stage.name, list(arguments)) as context:
            options = Given(self.stage, context.params).options
        backend = start_backend(options, torch_on_cpus=self.stage is not DENOISE)
        if self.stage is DENOISE:
            backend.import_denoiser()
        else:
            backend.import_vae()

    def run(self, *arguments: str) -> None:
        """Do one run, by the flags of the stage's script.

        Raises:
            StageError: as the script would end, with its exit code.
            TyperException: flags that the script does not take.
        """
        self.command.main([*arguments], prog_name=self.stage.name, standalone_mode=False)

    def close(self) -> None:
        """Let go of models and programs."""
        self.kept.clear()
