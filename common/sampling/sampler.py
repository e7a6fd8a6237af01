"""diffusers' schedulers by their short names, driven as diffusers' pipelines drive them.

Nothing of diffusers is imported until a scheduler is made, so that settings can be checked early.
"""

import contextlib
import difflib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.errors import BadSettingError, in_one_line
from common.sampling.schedulers import SCHEDULERS
from common.sampling.step_range import StepRange

if TYPE_CHECKING:
    import torch


LMS_ORDER = 4  # diffusers' default

# What libraries raise where a scheduler cannot do what it is asked for.
REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError)


def make_scheduler(config: Mapping[str, Any], class_name: str, options: Mapping[str, Any]) -> Any:
    """A diffusers scheduler with a checkpoint's scheduler settings and further ones.

    Raises:
        BadSettingError: an unknown class or option, or one that diffusers refuses.
    """
    import diffusers

    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None or not hasattr(scheduler_class, "set_timesteps"):
        raise BadSettingError(
            f"diffusers has no scheduler {class_name}: choose another by --scheduler, such as "
            f"{', '.join(SCHEDULERS)}"
        )
    known = inspect.signature(scheduler_class.__init__).parameters.keys() - {"self"}
    for name in options:
        if name == "noise_sampler_seed":
            raise BadSettingError(
                "--scheduler_option noise_sampler_seed: its noise follows the images' own seeds; "
                "use --seed"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise BadSettingError(
                f"--scheduler_option {name}: {class_name} has no such setting; did you mean "
                f"{near[0]!r}? It has {', '.join(sorted(known))}"
            )
    with refused_in_words(f"{class_name} with {dict(options) or 'the settings of the checkpoint'}"):
        return scheduler_class.from_config(config, **options)


def as_pipeline_reads_it(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """An SD 1.x/2.x checkpoint's scheduler settings as `StableDiffusionPipeline` mends old ones.

    Its constructor sets `steps_offset` to 1 and `clip_sample` to false; where the file does not
    name them, that holds only for the checkpoint's own class.
    """
    import diffusers

    mended = dict(config)
    own = config["_class_name"]
    own_class = getattr(diffusers, own, None)
    parameters = inspect.signature(own_class.__init__).parameters if own_class is not None else ()
    for name, value in (("steps_offset", 1), ("clip_sample", False)):
        if name in config or (own == class_name and name in parameters):
            mended[name] = value
    return mended


@contextlib.contextmanager
def refused_in_words(what: str) -> Iterator[None]:
    """Turn diffusers' refusal of a scheduler's settings into one sentence."""
    try:
        yield
    except REFUSALS as error:
        reason = in_one_line(error) or "without a reason"
        raise BadSettingError(
            f"diffusers refuses {what} ({reason}): change --scheduler, --scheduler_option or the "
            "number of steps"
        ) from error


class Sampler:
    """A scheduler, and how a run steps it.

    `restart`, then for each timestep `scale_model_input` and `step`: the loop of diffusers'
    pipelines, one model evaluation at a time.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        step_range: StepRange = StepRange(),  # noqa: B008  # frozen
    ) -> None:
        """Give exactly one of the number of steps, the timesteps, the sigmas."""
        self.scheduler = scheduler
        self.step_range = step_range
        self.name = type(scheduler).__name__
        self.spacing: dict[str, Any] = {
            name: value if isinstance(value, int) else list(value)
            for name, value in (
                ("num_inference_steps", num_inference_steps),
                ("timesteps", timesteps),
                ("sigmas", sigmas),
            )
            if value is not None
        }
        step_parameters = inspect.signature(scheduler.step).parameters
        self.takes_generator = "generator" in step_parameters
        self.takes_eta = "eta" in step_parameters
        # diffusers' pipelines hand their `eta` to every scheduler that takes one.
        self.extra_options: dict[str, Any] = {"eta": eta} if self.takes_eta else {}

    def identity(self) -> str:
        """All that determines what it does, besides seeds."""
        config = sorted((name, repr(value)) for name, value in self.scheduler.config.items())
        return repr((self.name, config, self.spacing, self.extra_options, self.step_range))

    def restart(self, seeds: Sequence[int] = (0,)) -> "torch.Tensor":
        """Forget all steps. Returns the timesteps, one for each model evaluation.

        Args:
            seeds: of the images to come, for a scheduler that grows a noise tree from each.

        Raises:
            BadSettingError: diffusers refuses the number of steps, the timesteps or the sigmas.
        """
        if hasattr(self.scheduler, "noise_sampler_seed"):
            self.scheduler.noise_sampler_seed = list(seeds)
        (name, value), *_ = self.spacing.items()
        if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise BadSettingError(f"--{name}: {self.name} takes none in diffusers")
        with refused_in_words(f"{self.name} with {name} {value}"):
            self.scheduler.set_timesteps(**self.spacing)
        self.cut = self.step_range.cut(self.scheduler)
        if hasattr(self.scheduler, "set_begin_index"):
            # As diffusers' SDXL pipeline does. Without it the first step is looked for by its
            # timestep, and where two begin with the same one (beta sigmas, many steps) the second
            # is found, and a step is missing at the end.
            self.scheduler.set_begin_index(self.cut.first)
        self._evaluated = 0
        return self.cut.timesteps

    def add_noise(self, latents: "torch.Tensor", noise: "torch.Tensor") -> "torch.Tensor":
        """Latents [B, C, h, w] with as much noise as there is before the first step."""
        timesteps = self.restart()
        noised: torch.Tensor = self.scheduler.add_noise(latents, noise, timesteps[:1])
        return noised

    def noised_after(
        self, evaluation: int, latents: "torch.Tensor", noise: "torch.Tensor"
    ) -> "torch.Tensor":
        """Latents [B, C, h, w] with as much noise as there is after a model evaluation.

        Args:
            evaluation: the last that was stepped, from 0.
        """
        following = self.cut.timesteps[evaluation + 1 : evaluation + 2]
        if len(following) == 0 and self.cut.following is not None:
            following = self.cut.following
        if len(following) == 0:
            return latents
        noised: torch.Tensor = self.scheduler.add_noise(latents, noise, following)
        return noised

    @property
    def initial_noise_scale(self) -> float:
        """diffusers' `init_noise_sigma`, which `restart` may have changed."""
        return float(self.scheduler.init_noise_sigma)

    def scale_model_input(self, sample: "torch.Tensor", timestep: "torch.Tensor") -> "torch.Tensor":
        """What the model is to see of `sample`."""
        scaled: torch.Tensor = self.scheduler.scale_model_input(sample, timestep)
        return scaled

    def step(
        self,
        model_output: "torch.Tensor",
        timestep: "torch.Tensor",
        sample: "torch.Tensor",
        generators: "list[torch.Generator]",
    ) -> "torch.Tensor":
        """The next sample. All [B, C, h, w]; one generator for each image."""
        options = dict(self.extra_options)
        if self.takes_generator:
            options["generator"] = generators
        self._evaluated += 1
        if self.name == "LMSDiscreteScheduler":
            # Its order grows with what it has seen. By itself it takes the order from the place in
            # the schedule, and in the middle of one it weighs what it has not seen.
            options["order"] = min(self._evaluated, LMS_ORDER)
        with refused_in_words(f"{self.name} with {self.spacing}"):
            stepped: torch.Tensor = self.scheduler.step(
                model_output, timestep, sample, return_dict=False, **options
            )[0]
        return stepped

    @contextlib.contextmanager
    def intercepted_noises(
        self, hear: "Callable[[tuple[int, ...], Callable[[], torch.Tensor]], torch.Tensor]"
    ) -> Iterator[None]:
        """Let `hear` stand between the scheduler and each noise that it draws.

        `hear(shape, draw)` returns the noise to use; `draw()` gives the scheduler's own.
        """
        module: Any = sys.modules[type(self.scheduler).__module__]
        originals = {
            name: getattr(module, name)
            for name in ("randn_tensor", "BrownianTreeNoiseSampler")
            if hasattr(module, name)
        }

        def heard_randn(shape: Any, *args: Any, **kwargs: Any) -> "torch.Tensor":
            return hear(tuple(shape), lambda: originals["randn_tensor"](shape, *args, **kwargs))

        class HeardBrownianTree:
            """DPMSolverSDE's noises are increments of Brownian motion between two sigmas."""

            def __init__(self, sample: "torch.Tensor", *args: Any) -> None:
                self.shape = tuple(sample.shape)
                self.grow = lambda: originals["BrownianTreeNoiseSampler"](sample, *args)
                self.tree: Any = None

            def __call__(self, sigma: Any, next_sigma: Any) -> "torch.Tensor":
                def draw() -> "torch.Tensor":
                    self.tree = self.tree or self.grow()
                    noise: torch.Tensor = self.tree(sigma, next_sigma)
                    return noise

                return hear(self.shape, draw)

        replacements = {
            "randn_tensor": heard_randn,
            "BrownianTreeNoiseSampler": HeardBrownianTree,
        }
        for name in originals:
            setattr(module, name, replacements[name])
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(module, name, original)
