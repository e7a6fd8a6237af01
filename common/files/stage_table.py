"""The stages: the script of each, what it reads and what it makes. Nothing else counts them."""

from dataclasses import dataclass

from common.declared import EMBEDDINGS, IMAGE_LATENTS, LATENTS, PICTURES

IMAGE_LATENTS_FILE = "stage0_latents.safetensors"
EMBEDDINGS_FILE = "stage1_embeddings.safetensors"
LATENTS_FILE = "stage2_latents.safetensors"
TRAJECTORY_FILE = "stage2_trajectory.safetensors"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the table."""

    number: int
    script: str  # in stages/
    makes: str  # the artifact that settings shape
    reads: str | None  # the file of the stage before
    writes: tuple[str, ...]  # files that other stages read
    dtype: str  # the setting that its `--dtype` stands for
    estimate: str | None = None  # the function that does `--topology`, where the stage has that
    of_pictures: bool = False  # only runs that begin with pictures have it

    @property
    def name(self) -> str:
        """As users count them."""
        return f"stage {self.number}"

    @property
    def command(self) -> str:
        """How it is called."""
        return f"python stages/{self.script}"


ENCODE = Stage(
    number=1,
    script="stage1_text_encoder.py",
    makes=EMBEDDINGS,
    reads=None,
    writes=(EMBEDDINGS_FILE,),
    dtype="text_encoder_dtype",
)
ENCODE_PICTURES = Stage(
    number=0,
    script="stage0_image_encoder.py",
    makes=IMAGE_LATENTS,
    reads=None,
    writes=(IMAGE_LATENTS_FILE,),
    dtype="vae_dtype",
    estimate="common.runs.topology:estimate_encoding",
    of_pictures=True,
)
DENOISE = Stage(
    number=2,
    script="stage2_unet.py",
    makes=LATENTS,
    reads=EMBEDDINGS_FILE,
    writes=(LATENTS_FILE, TRAJECTORY_FILE),
    dtype="unet_dtype",
    estimate="common.runs.topology:estimate_denoising",
)
DECODE = Stage(
    number=3,
    script="stage3_vae_decoder.py",
    makes=PICTURES,
    reads=LATENTS_FILE,
    writes=(),
    dtype="vae_dtype",
    estimate="common.runs.topology:estimate_decoding",
)
# In the order of a run. Pictures are encoded once all settings, their size among them, are settled.
STAGES = (ENCODE, ENCODE_PICTURES, DENOISE, DECODE)
OF_EVERY_RUN = tuple(stage for stage in STAGES if not stage.of_pictures)
FIRST, LAST = STAGES[0], STAGES[-1]  # the first one settles all settings


def maker_of(artifact: str) -> Stage:
    """The stage that makes an artifact."""
    return next(stage for stage in STAGES if stage.makes == artifact)


def stages_from(first: int, last: int) -> list[Stage]:
    """The stages from one to another, by their numbers, in the order of a run."""
    numbers = [stage.number for stage in STAGES]
    return list(STAGES[numbers.index(first) : numbers.index(last) + 1])


def numbered(number: int) -> Stage:
    """A stage by its number."""
    return next(stage for stage in STAGES if stage.number == number)
